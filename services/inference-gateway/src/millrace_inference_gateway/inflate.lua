-- The first bytes of what gzip or deflate packed (RFC 1950 to 1952): enough to read a model's name from a compressed message.
-- Bounded by the bytes it is given and the bytes that are wanted; nothing is checked that those bytes do not need.
local MAX_CODE_BITS = 15
local LENGTH_EXTRA, DISTANCE_EXTRA, LENGTH_BASE, DISTANCE_BASE = {}, {}, {}, {}
do
  local length, distance = 3, 1
  for i = 0, 27 do
    LENGTH_EXTRA[i] = i < 8 and 0 or math.floor(i / 4) - 1
    LENGTH_BASE[i] = length
    length = length + 2 ^ LENGTH_EXTRA[i]
  end
  LENGTH_EXTRA[28], LENGTH_BASE[28] = 0, 258
  for i = 0, 29 do
    DISTANCE_EXTRA[i] = i < 4 and 0 or math.floor(i / 2) - 1
    DISTANCE_BASE[i] = distance
    distance = distance + 2 ^ DISTANCE_EXTRA[i]
  end
end
local CODE_ORDER = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

local function code_tree(lengths, from, size)
  local counts, offsets, symbols = {}, {}, {}
  for bits = 0, MAX_CODE_BITS do counts[bits] = 0 end
  for i = 0, size - 1 do counts[lengths[from + i]] = counts[lengths[from + i]] + 1 end
  offsets[1] = 0
  for bits = 1, MAX_CODE_BITS - 1 do offsets[bits + 1] = offsets[bits] + counts[bits] end
  for i = 0, size - 1 do
    local bits = lengths[from + i]
    if bits > 0 then
      symbols[offsets[bits]] = i
      offsets[bits] = offsets[bits] + 1
    end
  end
  return counts, symbols
end

-- Throws where the bytes end or make no sense; `out` has what was found until then.
local function inflate(text, at, wanted, out)
  local hold, held = 0, 0
  local function take(count)
    while held < count do
      hold = hold + string.byte(text, at) * 2 ^ held
      held = held + 8
      at = at + 1
    end
    local value = hold % 2 ^ count
    hold = (hold - value) / 2 ^ count
    held = held - count
    return value
  end
  local function symbol(counts, symbols)
    local code, first, index = 0, 0, 0
    for bits = 1, MAX_CODE_BITS do
      code = code + take(1)
      local count = counts[bits]
      if code - count < first then return symbols[index + code - first] end
      index = index + count
      first = (first + count) * 2
      code = code * 2
    end
    error("no such code")
  end
  local function block(counts, symbols, far_counts, far_symbols)
    while #out < wanted do
      local found = symbol(counts, symbols)
      if found == 256 then return end
      if found < 256 then
        out[#out + 1] = string.char(found)
      else
        local length = LENGTH_BASE[found - 257] + take(LENGTH_EXTRA[found - 257])
        local far = symbol(far_counts, far_symbols)
        local distance = DISTANCE_BASE[far] + take(DISTANCE_EXTRA[far])
        if distance > #out then error("before the start") end
        for _ = 1, length do out[#out + 1] = out[#out + 1 - distance] end
      end
    end
  end
  local function fixed()
    local lengths = {}
    for i = 0, 287 do lengths[i] = i < 144 and 8 or i < 256 and 9 or i < 280 and 7 or 8 end
    for i = 288, 317 do lengths[i] = 5 end
    return lengths, 288, 30
  end
  local function dynamic()
    local near, far, codes = take(5) + 257, take(5) + 1, take(4) + 4
    local lengths = {}
    for i = 0, 18 do lengths[i] = 0 end
    for i = 1, codes do lengths[CODE_ORDER[i]] = take(3) end
    local counts, symbols = code_tree(lengths, 0, 19)
    local found, size = {}, 0
    while size < near + far do
      local code = symbol(counts, symbols)
      local value, times = code, 1
      if code == 16 then
        value, times = found[size - 1], take(2) + 3
      elseif code == 17 then
        value, times = 0, take(3) + 3
      elseif code == 18 then
        value, times = 0, take(7) + 11
      end
      for _ = 1, times do
        found[size] = value
        size = size + 1
      end
    end
    return found, near, far
  end
  repeat
    local last, kind = take(1), take(2)
    if kind == 0 then
      take(held % 8)
      local length = take(16)
      take(16)
      for _ = 1, math.min(length, wanted - #out) do out[#out + 1] = string.char(take(8)) end
    else
      local lengths, near, far
      if kind == 1 then lengths, near, far = fixed() else lengths, near, far = dynamic() end
      local counts, symbols = code_tree(lengths, 0, near)
      local far_counts, far_symbols = code_tree(lengths, near, far)
      block(counts, symbols, far_counts, far_symbols)
    end
  until last == 1 or #out >= wanted
end

-- At most `wanted` bytes of what `text` packs; nil when it is of no kind that is known.
local function unpacked_head(text, encoding, wanted)
  local at
  if encoding == "gzip" and string.sub(text, 1, 4) == "\31\139\8\0" then at = 11 end
  if encoding == "deflate" then at = 3 end
  if at == nil then return nil end
  local out = {}
  pcall(inflate, text, at, wanted, out)
  return table.concat(out)
end
