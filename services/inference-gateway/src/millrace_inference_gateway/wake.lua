-- Stands before a version that is asleep, and only there: holds the call until the gateway's Python process says that servers are there,
-- or says why not.
local CLUSTER = "{cluster}"
local PATH = "{path}"
local WAIT_MS = {wait_ms}
local PROBE_MS = 1000
local ATTEMPTS = 20
local RETRY_AFTER_S = "{retry_after_s}"
-- A gRPC message without fields.
local EMPTY = "\0\0\0\0\0"

local function refuse(handle, is_grpc, code, message, details)
  if is_grpc then
    local headers = {{
      [":status"] = "200", ["content-type"] = "application/grpc", ["grpc-status"] = code, ["grpc-message"] = message,
      ["retry-after"] = RETRY_AFTER_S, ["grpc-retry-pushback-ms"] = RETRY_AFTER_S .. "000",
    }}
    if details ~= nil then headers["grpc-status-details-bin"] = details end
    return handle:respond(headers, nil)
  end
  local headers = {{[":status"] = "503", ["content-type"] = "application/json", ["retry-after"] = RETRY_AFTER_S}}
  handle:respond(headers, '{{"error":"' .. string.gsub(message, '["\\%c]', " ") .. '"}}')
end

-- Whether this worker thread of Envoy sends calls to the version's servers: they learn of servers a moment after the main thread.
local function reaches(handle, cluster, is_grpc)
  local probe = {{[":method"] = "GET", [":path"] = "/v2/health/live", [":authority"] = "gateway"}}
  local body = nil
  if is_grpc then
    probe = {{
      [":method"] = "POST", [":path"] = "/inference.GRPCInferenceService/ServerLive", [":authority"] = "gateway",
      ["content-type"] = "application/grpc", ["te"] = "trailers",
    }}
    body = EMPTY
  end
  local answer = handle:httpCall(cluster, probe, body, PROBE_MS)
  return answer[":status"] ~= "503" and answer["grpc-status"] ~= "14"
end

function envoy_on_request(handle)
  local context = handle:filterContext()
  local kind = handle:headers():get("content-type") or ""
  local is_grpc = string.sub(kind, 1, 16) == "application/grpc"
  local cluster = context:get("cluster")
  local ask = {{
    [":method"] = "POST", [":path"] = PATH, [":authority"] = "gateway", ["content-type"] = "application/grpc",
    ["te"] = "trailers", ["x-millrace-protocol"] = is_grpc and "grpc" or "http",
    ["x-millrace-model"] = context:get("model"), ["x-millrace-version"] = context:get("version"),
  }}
  for attempt = 0, ATTEMPTS do
    -- The door waits a little before it answers a further attempt.
    ask["x-millrace-attempt"] = tostring(attempt)
    local answer = handle:httpCall(CLUSTER, ask, EMPTY, WAIT_MS)
    local status = answer["grpc-status"]
    if answer[":status"] ~= "200" or (status ~= nil and status ~= "0") then
      if status == nil then return refuse(handle, is_grpc, "14", "the gateway cannot wake the version now", nil) end
      return refuse(handle, is_grpc, status, answer["grpc-message"] or "", answer["grpc-status-details-bin"])
    end
    if reaches(handle, cluster, is_grpc) then return end
  end
end
