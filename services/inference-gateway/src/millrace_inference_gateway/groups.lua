-- Puts the groups that a proven token names into x-millrace-groups, each between commas, for the rights of models.
local CLAIM = "{claim}"
local MAX_BYTES = 8192

local function claim_of(payload)
  if payload[CLAIM] ~= nil then return payload[CLAIM] end
  for name in string.gmatch(CLAIM, "[^.]+") do
    if type(payload) ~= "table" then return nil end
    payload = payload[name]
  end
  return payload
end

function envoy_on_request(handle)
  local found = handle:streamInfo():dynamicMetadata():get("envoy.filters.http.jwt_authn")
  local payload = found ~= nil and found["jwt"] or nil
  if payload == nil then return end
  local groups = claim_of(payload)
  if type(groups) == "string" then
    local listed = {{}}
    for name in string.gmatch(groups, "[^ ]+") do listed[#listed + 1] = name end
    groups = listed
  end
  if type(groups) ~= "table" then return end
  local text = ","
  for _, name in ipairs(groups) do
    -- A name that could be read as two is none.
    if type(name) == "string" and string.find(name, "^[^,%c]+$") and #text + #name < MAX_BYTES then text = text .. name .. "," end
  end
  handle:headers():replace("x-millrace-groups", text)
end
