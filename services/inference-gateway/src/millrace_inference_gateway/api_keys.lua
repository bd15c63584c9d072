-- Lets a call through that brings an API key whose SHA-256 is known, or a JWT the filter before this one has proven.
-- The key itself goes no further; the name it stands for does, in x-millrace-client.
local HASHES = {{{hashes}}}
local HEADER = "{header}"
local JWT = {jwt}
local CLAIM = "{claim}"
local OPEN = "/grpc.health.v1.Health/"
local HTTP_OPEN = "/v2/health/"
-- Keys proven lately, so that a caller's key is hashed once a worker.
local MAX_PROVEN = 1000
local MAX_KEY_BYTES = 512

local bit = require("bit")
local band, bnot, bxor, ror, rshift, tobit = bit.band, bit.bnot, bit.bxor, bit.ror, bit.rshift, bit.tobit
local proven, count = {{}}, 0

-- FIPS 180-4: the first 32 bits of the fractional parts of the cube roots of the first 64 primes, and of the square roots of 8.
local K, START = {{}}, {{}}
do
  local function fraction(value) return tobit(math.floor((value - math.floor(value)) * 4294967296)) end
  local candidate, found = 2, 0
  while found < 64 do
    local prime = true
    for divisor = 2, math.floor(math.sqrt(candidate)) do
      if candidate % divisor == 0 then prime = false break end
    end
    if prime then
      found = found + 1
      K[found] = fraction(candidate ^ (1 / 3))
      if found <= 8 then START[found] = fraction(math.sqrt(candidate)) end
    end
    candidate = candidate + 1
  end
end

local function sha256(text)
  local size = #text
  local padded = text .. "\128" .. string.rep("\0", (55 - size) % 64) .. "\0\0\0\0" ..
    string.char(band(rshift(size * 8, 24), 255), band(rshift(size * 8, 16), 255), band(rshift(size * 8, 8), 255), band(size * 8, 255))
  local h = {{unpack(START)}}
  local w = {{}}
  for block = 1, #padded, 64 do
    for i = 1, 16 do
      local a, b, c, d = string.byte(padded, block + i * 4 - 4, block + i * 4 - 1)
      w[i] = tobit(a * 16777216 + b * 65536 + c * 256 + d)
    end
    for i = 17, 64 do
      local x, y = w[i - 15], w[i - 2]
      local s0 = bxor(ror(x, 7), ror(x, 18), rshift(x, 3))
      local s1 = bxor(ror(y, 17), ror(y, 19), rshift(y, 10))
      w[i] = tobit(w[i - 16] + s0 + w[i - 7] + s1)
    end
    local a, b, c, d, e, f, g, last = unpack(h)
    for i = 1, 64 do
      local s1 = bxor(ror(e, 6), ror(e, 11), ror(e, 25))
      local one = tobit(last + s1 + bxor(band(e, f), band(bnot(e), g)) + K[i] + w[i])
      local s0 = bxor(ror(a, 2), ror(a, 13), ror(a, 22))
      local two = tobit(s0 + bxor(band(a, b), band(a, c), band(b, c)))
      last, g, f, e, d, c, b, a = g, f, e, tobit(d + one), c, b, a, tobit(one + two)
    end
    local now = {{a, b, c, d, e, f, g, last}}
    for i = 1, 8 do h[i] = tobit(h[i] + now[i]) end
  end
  local parts = {{}}
  for i = 1, 8 do parts[i] = bit.tohex(h[i]) end
  return table.concat(parts)
end

local function client_of(key)
  local known = proven[key]
  if known ~= nil then return known end
  local name = HASHES[sha256(key)]
  if name ~= nil then
    if count >= MAX_PROVEN then proven, count = {{}}, 0 end
    proven[key], count = name, count + 1
  end
  return name
end

-- The client's name in a token's payload; nil for none, who is nobody then.
local function claim_of(payload)
  local value = payload[CLAIM]
  if value == nil then
    value = payload
    for name in string.gmatch(CLAIM, "[^.]+") do
      if type(value) ~= "table" then return "" end
      value = value[name]
    end
  end
  return (type(value) == "string" or type(value) == "number") and tostring(value) or ""
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local path = headers:get(":path") or ""
  if string.sub(path, 1, #OPEN) == OPEN or string.sub(path, 1, #HTTP_OPEN) == HTTP_OPEN then return end
  headers:remove("x-millrace-client")
  local key = headers:get(HEADER)
  local name = key ~= nil and #key <= MAX_KEY_BYTES and client_of(key) or nil
  headers:remove(HEADER)
  if name == nil and JWT and key == nil then
    local found = handle:streamInfo():dynamicMetadata():get("envoy.filters.http.jwt_authn")
    local payload = found ~= nil and found["jwt"] or nil
    if payload ~= nil then name = claim_of(payload) end
  end
  if name == nil then
    local text = key == nil and HEADER .. ": an API key is needed" or HEADER .. ": the API key is not known"
    local kind = headers:get("content-type") or ""
    if string.sub(kind, 1, 16) ~= "application/grpc" then
      return handle:respond({{[":status"] = "401", ["content-type"] = "application/json", ["x-millrace-refused"] = "api_key"}}, '{{"error":"' .. text .. '"}}')
    end
    return handle:respond({{
      [":status"] = "200", ["content-type"] = "application/grpc", ["grpc-status"] = "16", ["grpc-message"] = text,
      ["x-millrace-refused"] = "api_key"
    }}, nil)
  end
  headers:replace("x-millrace-client", name)
  -- Rules may ask for the name.
  handle:clearRouteCache()
end
