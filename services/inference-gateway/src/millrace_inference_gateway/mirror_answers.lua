-- Of copies whose original was sampled, the answer and the segment go into dynamic metadata, from where the access log carries them.
local SAMPLES_PER_S = {samples_per_s}
local SAMPLE_MAX_BYTES = {sample_max_bytes}
local NAMESPACE = "millrace"
local MAX_SEGMENT = 64

-- Whoever writes the mark into a call of its own must not be able to have everything copied.
local tokens, filled_at = SAMPLES_PER_S, 0

local function take(handle)
  local now = handle:timestamp()
  tokens = math.min(SAMPLES_PER_S, tokens + (now - filled_at) * SAMPLES_PER_S / 1000)
  filled_at = now
  if tokens < 1 then return false end
  tokens = tokens - 1
  return true
end

function envoy_on_request(handle)
  local headers = handle:headers()
  if headers:get("{sampled_header}") == nil or not take(handle) then return end
  local metadata = handle:streamInfo():dynamicMetadata()
  metadata:set(NAMESPACE, "sampled", "1")
  local wanted = handle:metadata():get("segment_header")
  local segment = wanted and headers:get(wanted)
  if segment then metadata:set(NAMESPACE, "segment", string.sub(segment, 1, MAX_SEGMENT)) end
end

function envoy_on_response(handle)
  local kept = handle:streamInfo():dynamicMetadata():get(NAMESPACE)
  if kept == nil or kept["sampled"] == nil then return end
  local parts, size = {{}}, 0
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    size = size + length
    if size > SAMPLE_MAX_BYTES then return end
    if length > 0 then parts[#parts + 1] = chunk:getBytes(0, length) end
  end
  -- Waiting for the body ended the life of the first handle to the metadata.
  handle:streamInfo():dynamicMetadata():set(NAMESPACE, "response", handle:base64Escape(table.concat(parts)))
end
