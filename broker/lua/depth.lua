-- How much waits and runs, per queue key, and since when the longest-waiting job waits.
-- ARGV: prefix. Reply: {{queue key, waiting, leased, oldest_age_ms, cost of what waits, ran, ran_ms, ran_cost (lib/rates.lua)},
-- ...}; keys where nothing waits or runs are left out.
-- uses: clock, queue

local now = now_ms()

-- How long the first job of a stream has waited.
local function age(queue)
  local entry = call('XRANGE', P .. queue, '-', '+', 'COUNT', 1)[1]
  local job = entry and load_job(entry[2][2])
  return job and job.at ~= '' and now - tonumber(job.at) or 0
end

local depths, answer = {}, {}
local counters = call('HGETALL', P .. 'counters')
for i = 1, #counters, 2 do -- totals of all models that ever were stand among them, and patterns are slow
  local ending = counters[i + 1] ~= '0' and string.sub(counters[i], -8) or ''
  local waits = ending == ':waiting'
  if waits or string.sub(ending, 2) == ':leased' then
    local key = string.sub(counters[i], 1, waits and -9 or -8)
    if not depths[key] then answer[#answer + 1] = { key, 0, 0, 0 } end
    depths[key] = depths[key] or answer[#answer]
    depths[key][waits and 2 or 3] = tonumber(counters[i + 1])
  end
end
for _, found in ipairs(answer) do
  local at = without_region(found[1])
  for i, field in ipairs({ found[1] .. ':cost', at .. ':ran', at .. ':ran_ms', at .. ':ran_cost' }) do
    found[4 + i] = counter('counters', field)
  end
  for _, queue in ipairs(found[2] > 0 and streams_at(found[1], MAX_TENANTS) or {}) do
    found[4] = math.max(found[4], age(queue))
  end
end
return answer
