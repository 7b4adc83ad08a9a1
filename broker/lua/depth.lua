-- How much waits and runs, per pool and lane, and since when the longest-waiting job waits.
-- ARGV: prefix. Reply: {{'<pool>:<lane>', waiting, leased, oldest_age_ms}, ...}; places with neither are left out.

local now = now_ms()
local MAX_TENANTS = 256
local places, order = {}, {}
local depth = call('HGETALL', P .. 'depth')
for i = 1, #depth, 2 do
  local where, kind = string.match(depth[i], '^(.*):(%a+)$')
  if not places[where] then
    places[where] = { waiting = 0, leased = 0 }
    order[#order + 1] = where
  end
  places[where][kind] = tonumber(depth[i + 1])
end

local function head_time(queue)
  local entry = call('XRANGE', queue, '-', '+', 'COUNT', 1)[1]
  local at = entry and call('HGET', P .. 'job:' .. entry[2][2], 'at')
  return at and tonumber(at) or now
end

local function oldest(where)
  local since = math.min(head_time(P .. 'retry:' .. where), head_time(P .. 'suspects:' .. where))
  for band = 0, 3 do
    for _, tenant in ipairs(call('ZRANGE', P .. 'active:' .. where .. ':' .. band, 0, MAX_TENANTS - 1)) do
      since = math.min(since, head_time(P .. 'q:' .. where .. ':' .. band .. ':' .. tenant))
    end
  end
  return now - since
end

local answer = {}
for _, where in ipairs(order) do
  local found = places[where]
  answer[#answer + 1] = { where, found.waiting, found.leased, found.waiting > 0 and oldest(where) or 0 }
end
return answer
