-- Three jobs, the first two for V2 calls only:
-- 1. a client that sends no x-millrace-model metadata has the model's name read from the head of its message
--    (field 1 of every per-model V2 request), and the route is chosen again;
-- 2. of some calls a small payload is copied into dynamic metadata, from where the access log carries it;
-- 3. a caller's key that comes by baggage is put where the split looks for it.
local SAMPLE_RATIO = {sample_ratio}
local SAMPLES_PER_S = {samples_per_s}
local SAMPLE_MAX_BYTES = {sample_max_bytes}
local NAMESPACE = "millrace"
local V2 = "/inference.GRPCInferenceService/"
local MODEL_METHODS = {{ModelInfer = true, ModelReady = true, ModelMetadata = true, ModelConfig = true, ModelStatistics = true}}
local HTTP_INFER = "^/v2/models/.+/infer$"
local HEAD_BYTES = 1024
-- Of a compressed message so much is unpacked.
local UNPACKED_BYTES = 256
local FRAME_BYTES = 5

local tokens, filled_at = SAMPLES_PER_S, 0

local function take_sample(handle)
  if SAMPLE_RATIO <= 0 or math.random() >= SAMPLE_RATIO then return false end
  local now = handle:timestamp()
  tokens = math.min(SAMPLES_PER_S, tokens + (now - filled_at) * SAMPLES_PER_S / 1000)
  filled_at = now
  if tokens < 1 then return false end
  tokens = tokens - 1
  return true
end

local function varint(text, at)
  local value, scale = 0, 1
  for _ = 1, 5 do
    local byte = string.byte(text, at)
    if byte == nil then return nil, at end
    at = at + 1
    value = value + (byte % 128) * scale
    if byte < 128 then return value, at end
    scale = scale * 128
  end
  return nil, at
end

-- Field 1 of the message at the head of `text`, when it is a text of 1 to 63 characters that a model may have as its name.
local function model_name(text)
  local at = 1
  while at <= #text do
    local tag, length
    tag, at = varint(text, at)
    if tag == nil or tag % 8 ~= 2 then return nil end
    length, at = varint(text, at)
    if length == nil then return nil end
    if tag == 10 then
      local name = string.sub(text, at, at + length - 1)
      if #name == length and #name <= 63 and string.find(name, "^[A-Za-z0-9][A-Za-z0-9_.-]*$") then return name end
      return nil
    end
    at = at + length
  end
  return nil
end

local function refuse(handle, code, message)
  handle:respond({{[":status"] = "200", ["content-type"] = "application/grpc", ["grpc-status"] = code, ["grpc-message"] = message}}, nil)
end

local function keep(handle, key, bytes)
  handle:streamInfo():dynamicMetadata():set(NAMESPACE, key, handle:base64Escape(bytes))
end

-- Copies a body while it passes; gives nil when it is larger than a sample may be.
local function copy(handle)
  local parts, size = {{}}, 0
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    size = size + length
    if size > SAMPLE_MAX_BYTES then return nil end
    if length > 0 then parts[#parts + 1] = chunk:getBytes(0, length) end
  end
  return table.concat(parts)
end

-- The key that other services carry by baggage, as `caller_key` reads it: for the split of calls without a key of their own.
local function take_key(handle, headers)
  local baggage = headers:get("baggage")
  local key = baggage and string.match("," .. baggage, ",%s*{sticky_member}%s*=%s*([^,;%s]+)")
  if key == nil then return end
  key = string.gsub(key, "%%(%x%x)", function(code) return string.char(tonumber(code, 16)) end)
  if #key > {max_key} or string.find(key, "[^\32-\126]") then return end
  headers:replace("{sticky_header}", key)
  handle:clearRouteCache()
end

function envoy_on_request(handle)
  local headers = handle:headers()
  take_key(handle, headers)
  local path = headers:get(":path") or ""
  if string.sub(path, 1, #V2) ~= V2 then
    -- By HTTP the path names the model.
    if string.find(path, HTTP_INFER) and take_sample(handle) then
      headers:replace("{sampled_header}", "1")
      local bytes = copy(handle)
      if bytes ~= nil then keep(handle, "request", bytes) end
    end
    return
  end
  local method = string.sub(path, #V2 + 1)
  local sampled = method == "ModelInfer" and take_sample(handle)
  -- So that the answer of a version that gets a copy is kept too.
  if sampled then headers:replace("{sampled_header}", "1") end
  if headers:get("{model_header}") == nil then
    if method == "ModelStreamInfer" then
      return refuse(handle, "3", "x-millrace-model: a stream needs the model's name in its metadata")
    end
    if not MODEL_METHODS[method] then return end
    -- Waiting for the body ends the life of this handle to the headers.
    local encoding = headers:get("grpc-encoding")
    local body = handle:body()
    local length = body and body:length() or 0
    if length < FRAME_BYTES then return refuse(handle, "3", "the body is no gRPC message") end
    local head = body:getBytes(FRAME_BYTES, math.min(length - FRAME_BYTES, HEAD_BYTES))
    if body:getBytes(0, 1) ~= "\0" then
      head = unpacked_head(head, encoding, UNPACKED_BYTES)
      if head == nil then
        return refuse(handle, "3", "x-millrace-model: a message with this compression needs the model's name in its metadata")
      end
    end
    local name = model_name(head)
    if name == nil then return refuse(handle, "3", "model_name: the message names no model") end
    handle:headers():replace("{model_header}", name)
    handle:clearRouteCache()
    if sampled and length <= SAMPLE_MAX_BYTES then keep(handle, "request", body:getBytes(0, length)) end
  elseif sampled then
    local bytes = copy(handle)
    if bytes ~= nil then keep(handle, "request", bytes) end
  end
end

function envoy_on_response(handle)
  local kept = handle:streamInfo():dynamicMetadata():get(NAMESPACE)
  if kept == nil or kept["request"] == nil then return end
  local bytes = copy(handle)
  if bytes ~= nil then keep(handle, "response", bytes) end
end
