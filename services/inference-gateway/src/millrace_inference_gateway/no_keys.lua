-- Stands where tokens are checked while the issuer's keys are not known: nobody with a token is let in, and everybody is told why.
local KEYS_TOO = {api_keys}
local OPEN = "/grpc.health.v1.Health/"
local HTTP_OPEN = "/v2/health/"
local TEXT = "the keys of the token issuer are not known to the gateway yet; try again later"

function envoy_on_request(handle)
  local headers = handle:headers()
  local path = headers:get(":path") or ""
  if string.sub(path, 1, #OPEN) == OPEN or string.sub(path, 1, #HTTP_OPEN) == HTTP_OPEN then return end
  if KEYS_TOO and headers:get("authorization") == nil then return end
  if string.sub(headers:get("content-type") or "", 1, 16) ~= "application/grpc" then
    return handle:respond({{[":status"] = "503", ["content-type"] = "application/json", ["x-millrace-refused"] = "no_keys"}}, '{{"error":"' .. TEXT .. '"}}')
  end
  handle:respond({{
    [":status"] = "200", ["content-type"] = "application/grpc", ["grpc-status"] = "14", ["grpc-message"] = TEXT,
    ["x-millrace-refused"] = "no_keys"
  }}, nil)
end
