-- Upstream filter of a version whose model servers hold others too: says in every call which one is meant, by its number there.
-- By HTTP that is a part of the path. By gRPC it is field 2 of each message about a model; of a field that comes twice the last one
-- counts, so it goes to the end of the message, and nothing is parsed or held.
local NUMBER = "{number}"
local GRPC_MODEL = "/inference.GRPCInferenceService/Model"
local FIELD = "\18" .. string.char(#NUMBER) .. NUMBER
local FRAME_BYTES = 5
-- What a server refuses, because it names no model.
local EMPTY = "\0\0\0\0\0"

local band, bor, bxor, lshift, rshift = bit.band, bit.bor, bit.bxor, bit.lshift, bit.rshift
local CRC = {{}}
for i = 0, 255 do
  local value = i
  for _ = 1, 8 do value = band(value, 1) == 1 and bxor(rshift(value, 1), 0xEDB88320) or rshift(value, 1) end
  CRC[i] = value
end

local function big(value)
  return string.char(band(rshift(value, 24), 255), band(rshift(value, 16), 255), band(rshift(value, 8), 255), band(value, 255))
end

local function little(value) return string.reverse(big(value)) end

local function number_at(bytes, at)
  local a, b, c, d = string.byte(bytes, at, at + 3)
  return ((a * 256 + b) * 256 + c) * 256 + d
end

local function crc32(bytes)
  local value = -1
  for i = 1, #bytes do value = bxor(rshift(value, 8), CRC[band(bxor(value, string.byte(bytes, i)), 255)]) end
  return bxor(value, -1)
end

-- zlib's crc32_combine: the CRC of two texts behind each other, from theirs and the length of the second.
local function times(matrix, vector)
  local sum, i = 0, 1
  while vector ~= 0 do
    if band(vector, 1) == 1 then sum = bxor(sum, matrix[i]) end
    vector, i = rshift(vector, 1), i + 1
  end
  return sum
end

local function squared(matrix)
  local found = {{}}
  for i = 1, 32 do found[i] = times(matrix, matrix[i]) end
  return found
end

local function crc_of_both(first, second, length)
  local operator = {{0xEDB88320}}
  for i = 2, 32 do operator[i] = lshift(1, i - 2) end
  operator = squared(squared(operator))
  while length > 0 do
    operator = squared(operator)
    if length % 2 == 1 then first = times(operator, first) end
    length = math.floor(length / 2)
  end
  return bxor(first, second)
end

-- Packed by gzip (RFC 1952) or deflate (RFC 1950): the field comes first, in a block that is stored, and the check of the whole
-- follows from those of both parts. So a version that such a message names itself counts.
local function stored(bytes)
  local low, high = #bytes % 256, math.floor(#bytes / 256)
  return "\0" .. string.char(low, high, 255 - low, 255 - high) .. bytes
end

local function gzip(message)
  if #message < 18 or string.sub(message, 1, 4) ~= "\31\139\8\0" then return nil end
  local crc = number_at(string.reverse(string.sub(message, -8, -5)), 1)
  local length = number_at(string.reverse(string.sub(message, -4)), 1)
  local whole = crc_of_both(crc32(FIELD), bit.tobit(crc), length)
  return string.sub(message, 1, 10) .. stored(FIELD) .. string.sub(message, 11, -9) .. little(whole) .. little(length + #FIELD)
end

-- zlib does not say how long the text is, which its check of two texts behind each other takes, but for a first one whose bytes add up
-- to nothing (modulo 65521): another field, which no server knows, makes them so.
local BASE = 65521
local PADDED, SUMS = nil, 0
do
  local head, sum = FIELD .. "\250\127\129\2", 0
  for i = 1, #head do sum = sum + string.byte(head, i) end
  local rest = BASE - sum
  local full = math.floor(rest / 255)
  PADDED = head .. string.rep("\255", full) .. string.char(rest % 255) .. string.rep("\0", 256 - full)
  local one = 1
  for i = 1, #PADDED do
    one = (one + string.byte(PADDED, i)) % BASE
    SUMS = (SUMS + one) % BASE
  end
end

local function deflate(message)
  if #message < 8 or string.byte(message, 1) % 16 ~= 8 or band(string.byte(message, 2), 32) ~= 0 then return nil end
  local check = number_at(message, #message - 3)
  local whole = (math.floor(check / 65536) + SUMS) % BASE * 65536 + check % 65536
  return string.sub(message, 1, 2) .. stored(PADDED) .. string.sub(message, 3, -5) .. big(whole)
end

local PACKERS = {{gzip = gzip, deflate = deflate}}

local function packed(message, encoding)
  local found = PACKERS[encoding or ""] and PACKERS[encoding](message)
  return found and "\1" .. big(#found) .. found or EMPTY
end

-- Passes the messages of a call on as they come. `left` is what is still to come of the one under way, `kept` a packed one's parts.
local function pass(handle, encoding)
  local held, left, kept = "", 0, nil
  for chunk in handle:bodyChunks() do
    local size = chunk:length()
    if kept == nil and left > size then
      left = left - size
    elseif size > 0 then
      local bytes, at, out = held .. chunk:getBytes(0, size), 1, {{}}
      held = ""
      while at <= #bytes do
        if left > 0 then
          local part = string.sub(bytes, at, at + left - 1)
          at, left = at + #part, left - #part
          local parts = kept or out
          parts[#parts + 1] = part
          if left == 0 then
            out[#out + 1] = kept and packed(table.concat(kept), encoding) or FIELD
            kept = nil
          end
        elseif #bytes - at + 1 < FRAME_BYTES then
          held = string.sub(bytes, at)
          break
        else
          left = number_at(bytes, at + 1)
          if string.byte(bytes, at) == 0 then
            out[#out + 1] = "\0" .. big(left + #FIELD)
            if left == 0 then out[#out + 1] = FIELD end
          elseif left == 0 then
            out[#out + 1] = EMPTY
          else
            kept = {{}}
          end
          at = at + FRAME_BYTES
        end
      end
      chunk:setBytes(table.concat(out))
    end
  end
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local path = headers:get(":path") or ""
  if string.sub(path, 1, #GRPC_MODEL) == GRPC_MODEL then
    local encoding = headers:get("grpc-encoding")
    -- Messages grow.
    headers:remove("content-length")
    return pass(handle, encoding)
  end
  local model, rest = string.match(path, "^(/v2/models/[^/?]+)(.*)$")
  if model ~= nil then headers:replace(":path", model .. "/versions/" .. NUMBER .. rest) end
end
