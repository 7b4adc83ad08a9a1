-- Makes indexes and counters agree with the records: a server that evicted keys, or an operator who deleted some, took them
-- apart. Each call looks at a part of the jobs. All counters of a shard with few live jobs are made anew; with many, what
-- waits and what it costs is counted by its streams, a part of the queue keys in a call.
-- ARGV: prefix, cursor among the jobs.
-- Reply: {cursor, what was repaired}: where to go on; '0' after a whole round.
-- Invariants: 1 no lost job, 8 bounded memory, 12 conservation.
-- uses: attempts, fence

local JOBS = 128 -- looked at in one call
local MAX_RECOUNTED = 1024 -- live jobs of a shard whose counters are made anew; with the persisted ones: their bytes too
local MAX_STALE_ENTRIES = 512 -- entries without a job that one call removes
local MAX_STREAMS = 512 -- whose entries are counted in one call, and all of one queue key
local MAX_COUNTED_TENANTS = 4096 -- of a band: with more, a queue key is not counted
local MAX_ENTRIES = 4096 -- of a queue key whose cost is added up; of more it is estimated, if what is known cannot be
local now, repaired, stale_entries = now_ms(), 0, 0
local live = call('ZCARD', P .. 'deadlines')
local is_small = live + call('ZCARD', P .. 'persisted') <= MAX_RECOUNTED
local waiting_keys = {} -- queue keys at which something waits, by the counters or by a job

-- Every live job is among the deadlines; it must also be in its stream, its worker's leases, or among the lost.
local function audit_job(id)
  local job = load_job(id)
  if job and job.state == 'queued' then waiting_keys[queue_key(job)] = true end
  if not job or TERMINAL[job.state] then
    call('ZREM', P .. 'deadlines', id)
  elseif job.state == 'queued' and not call('XRANGE', P .. job.queue, job.entry, job.entry)[1] then
    count_waiting(queue_key(job), job.queue, -1, job.cost)
    job.lane = without_region(job.lane)
    add_retry_entry(job)
    save(job)
    wake(queue_key(job), now)
  elseif job.state == 'leased' and is_fenced(job.owner) then
    retry_or_end(job, false, 'its worker is not known any more', now)
  elseif job.state == 'leased' and call('HEXISTS', P .. 'leases:' .. job.owner, id) == 0 then
    call('HSET', P .. 'leases:' .. job.owner, id, job.epoch)
  elseif job.state == 'lost' and not call('ZSCORE', P .. 'lost', id) then
    call('ZADD', P .. 'lost', int(now), id)
  else
    return
  end
  repaired = repaired + 1
end

-- Removes the entries of a stream whose jobs are not to be found by them.
local function drop_stale_entries(queue)
  for _, entry in ipairs(call('XRANGE', P .. queue, '-', '+', 'COUNT', MAX_RECOUNTED)) do
    if stale_entries >= MAX_STALE_ENTRIES then return end
    if not job_of_entry(queue, entry) then stale_entries = stale_entries + 1 end
  end
end

local function correct(hash, field, value)
  local off = value - counter(hash, field)
  if off == 0 then return end
  add(hash, field, off)
  repaired = repaired + 1
end

-- What the jobs of these streams cost in each band by their entries: exactly, or by the mean of the first of each stream.
local function costs_of(queues, number)
  local costs, share = {}, number <= MAX_ENTRIES and MAX_ENTRIES or math.max(1, math.floor(MAX_ENTRIES / #queues))
  for _, queue in ipairs(queues) do
    local entries, of_these = call('XRANGE', P .. queue, '-', '+', 'COUNT', share), 0
    for _, entry in ipairs(entries) do of_these = of_these + tonumber(string.match(entry[2][4] or '', ' (%d+)$') or 0) end
    local kind = cost_kind(queue)
    costs[kind] = (costs[kind] or 0) + of_these * (#entries < share and 1 or call('XLEN', P .. queue) / share)
  end
  return costs
end

-- What waits at a queue key is what its streams hold, and each job costs 1 at least. Begins at another key each time.
local function count_streams()
  local keys, counted = names_of(waiting_keys), 0
  table.sort(keys)
  for i = 1, #keys do
    local key = keys[(math.floor(now / 1000) + i) % #keys + 1]
    local queues, are_all = streams_at(key, MAX_COUNTED_TENANTS)
    local waits, cost = 0, 0
    for _, kind in ipairs(COSTS) do
      local known = counter('counters', key .. kind)
      cost = known < 0 and -math.huge or cost + known
    end
    for _, queue in ipairs(are_all and queues or {}) do waits = waits + call('XLEN', P .. queue) end
    if are_all and (waits <= MAX_ENTRIES or waits ~= waiting(key) or cost < waits) then
      correct('counters', key .. ':waiting', waits)
      local costs = costs_of(queues, waits)
      for _, kind in ipairs(COSTS) do correct('counters', key .. kind, math.floor(costs[kind] or 0)) end
    end
    counted = counted + #queues
    if counted >= MAX_STREAMS then return end
  end
end

-- Fields of the budget: all, or some thousands. Those that are repaired make room for the rest in the next call.
local function budget_fields()
  local fields, cursor = {}, '0'
  for _ = 1, 64 do
    local found = call('HSCAN', P .. 'budget', cursor, 'COUNT', MAX_RECOUNTED)
    for i = 1, #found[2], 2 do fields[#fields + 1] = found[2][i] end
    cursor = found[1]
    if cursor == '0' or #fields >= 8 * MAX_RECOUNTED then break end
  end
  return fields
end

local function recount(counter_fields)
  local counted = { budget = {}, counters = {} }
  local function count(hash, field, by) counted[hash][field] = (counted[hash][field] or 0) + by end
  for key in pairs(waiting_keys) do
    for _, queue in ipairs((streams_at(key, MAX_RECOUNTED))) do drop_stale_entries(queue) end
  end
  for _, field in ipairs(counter_fields) do
    if string.match(field, ':waiting$') or string.match(field, ':leased$') or string.match(field, ':cost$') then count('counters', field, 0) end
  end
  for _, field in ipairs(budget_fields()) do
    if field ~= 'dead:bytes' and (is_small or not string.match(field, ':persisted$')) then count('budget', field, 0) end
  end
  for _, index in ipairs(is_small and { 'deadlines', 'persisted' } or { 'deadlines' }) do
    for _, id in ipairs(call('ZRANGE', P .. index, 0, -1)) do
      local job = load_job(id)
      local bytes = is_small and job and job.persisted == '1' and call('HGET', P .. 'job:' .. id, 'persisted_bytes')
      if bytes then count('budget', 't:' .. job.tenant .. ':persisted', tonumber(bytes)) end
      if job and not TERMINAL[job.state] then
        local what = job.state == 'queued' and ':waiting' or job.state == 'leased' and ':leased'
        if what then count('counters', queue_key(job) .. what, 1) end
        if what == ':waiting' then count('counters', queue_key(job) .. cost_kind(job.queue), tonumber(job.cost)) end
        for _, who in ipairs({ 't:' .. job.tenant, 'p:' .. job.pool }) do
          count('budget', who .. ':jobs', 1)
          count('budget', who .. ':bytes', tonumber(job.size))
        end
      end
    end
  end
  for hash, fields in pairs(counted) do
    read(hash, names_of(fields))
    for field, value in pairs(fields) do correct(hash, field, value) end
  end
end

local jobs = call('ZSCAN', P .. 'deadlines', ARGV[2], 'COUNT', JOBS)
for i = 1, #jobs[2], 2 do audit_job(jobs[2][i]) end
local counter_fields = call('HKEYS', P .. 'counters')
for _, field in ipairs(counter_fields) do
  local key = string.match(field, '^(.*):waiting$')
  if key then waiting_keys[key] = true end
end
if live <= MAX_RECOUNTED then recount(counter_fields) else count_streams() end
return write_counters_and_return({ jobs[1], repaired + stale_entries })
