-- How much waits and runs, per queue key, and since when the longest-waiting job waits.
-- ARGV: prefix. Reply: {{queue key, waiting, leased, oldest_age_ms, cost of what waits, ran, ran_ms, ran_cost (lib/rates.lua),
-- ms until the earliest deadline of a tenant's first job ('': none waits)}, ...}; keys where nothing waits or runs are left
-- out.
-- uses: clock, queue

local now = now_ms()

-- How long the first job of a stream has waited, and how long it is until its deadline.
local function head(queue)
  local entry = call('XRANGE', P .. queue, '-', '+', 'COUNT', 1)[1]
  local job = entry and load_job(entry[2][2])
  if not job or job.at == '' then return 0 end
  return now - tonumber(job.at), math.max(0, tonumber(job.deadline) - now)
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
  found[9] = ''
  for _, queue in ipairs(found[2] > 0 and streams_at(found[1], MAX_TENANTS) or {}) do
    local age, left = head(queue)
    found[4] = math.max(found[4], age)
    if left and (found[9] == '' or left < found[9]) then found[9] = left end
  end
end
return answer
