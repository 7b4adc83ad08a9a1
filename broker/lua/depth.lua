-- How much waits and runs, per queue key, and since when the longest-waiting job waits.
-- ARGV: prefix. Reply: {{queue key, waiting, leased, oldest_age_ms}, ...}; keys with neither are left out.
-- uses: clock, queue

local MAX_TENANTS = 256
local now = now_ms()

-- How long the first job of a stream has waited.
local function age(queue)
  local entry = call('XRANGE', P .. queue, '-', '+', 'COUNT', 1)[1]
  local at = entry and call('HGET', P .. 'job:' .. entry[2][2], 'at')
  return at and now - tonumber(at) or 0
end

local depths, order = {}, {}
local counters = call('HGETALL', P .. 'counters')
for i = 1, #counters, 2 do
  local key, kind = string.match(counters[i], '^(.*):(%a+)$')
  if kind == 'waiting' or kind == 'leased' then
    if not depths[key] then order[#order + 1] = key end
    depths[key] = depths[key] or { waiting = 0, leased = 0 }
    depths[key][kind] = tonumber(counters[i + 1])
  end
end
for i, key in ipairs(order) do
  local found, oldest = depths[key], 0
  for _, queue in ipairs(found.waiting > 0 and streams_at(key, MAX_TENANTS) or {}) do
    oldest = math.max(oldest, age(queue))
  end
  order[i] = { key, found.waiting, found.leased, oldest }
end
return order
