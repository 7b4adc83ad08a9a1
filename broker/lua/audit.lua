-- Makes indexes and counters agree with the records: a server that evicted keys, or an operator who deleted some, took them
-- apart. Each call looks at a part of the jobs; all counters of a shard with few jobs are made anew.
-- ARGV: prefix, cursor among the jobs.
-- Reply: {cursor, what was mended}: where to go on; '0' after a whole round.
-- Invariants: 1 no lost job, 8 bounded memory, 12 conservation.
-- uses: attempts, fence

local JOBS = 128 -- looked at in one call
local MAX_RECOUNTED = 1024 -- live and persisted jobs of a shard whose counters are made anew
local MAX_GHOSTS = 512 -- entries without a job that one call removes
local now, mended, ghosts = now_ms(), 0, 0

-- Every live job stands among the deadlines; so must it in its stream, its worker's leases, or among the lost.
local function audit_job(id)
  local job = load_job(id)
  if not job or TERMINAL[job.state] then
    call('ZREM', P .. 'deadlines', id)
  elseif job.state == 'queued' and not call('XRANGE', P .. job.queue, job.entry, job.entry)[1] then
    add('counters', queue_key(job) .. ':waiting', -1)
    job.lane = without_region(job.lane)
    call('HSET', P .. 'job:' .. id, 'lane', job.lane, stand_again(job))
    wake(queue_key(job), now)
  elseif job.state == 'leased' and is_fenced(job.owner) then
    end_attempt(job, false, 'its worker is not known any more', now)
  elseif job.state == 'leased' and call('HEXISTS', P .. 'leases:' .. job.owner, id) == 0 then
    call('HSET', P .. 'leases:' .. job.owner, id, job.epoch)
  elseif job.state == 'lost' and not call('ZSCORE', P .. 'lost', id) then
    call('ZADD', P .. 'lost', int(now), id)
  else
    return
  end
  mended = mended + 1
end

-- Removes the entries of a stream whose jobs are not to be found by them.
local function drop_ghosts(queue)
  for _, entry in ipairs(call('XRANGE', P .. queue, '-', '+', 'COUNT', MAX_RECOUNTED)) do
    local found = call('HMGET', P .. 'job:' .. entry[2][2], 'state', 'entry')
    if (found[1] ~= 'queued' or found[2] ~= entry[1]) and ghosts < MAX_GHOSTS then
      drop_entry(queue, entry)
      ghosts = ghosts + 1
    end
  end
end

local function recount()
  local counted = { budget = {}, counters = {} }
  local function count(hash, field, by) counted[hash][field] = (counted[hash][field] or 0) + by end
  for _, field in ipairs(call('HKEYS', P .. 'counters')) do
    local key, what = string.match(field, '^(.*):(%a+)$')
    if what == 'waiting' or what == 'leased' then count('counters', field, 0) end
    for _, queue in ipairs(what == 'waiting' and streams_at(key, MAX_RECOUNTED) or {}) do drop_ghosts(queue) end
  end
  for _, field in ipairs(call('HKEYS', P .. 'budget')) do
    if field ~= 'dead:bytes' then count('budget', field, 0) end
  end
  for _, index in ipairs({ 'deadlines', 'persisted' }) do
    for _, id in ipairs(call('ZRANGE', P .. index, 0, -1)) do
      local job = load_job(id)
      local bytes = job and job.persisted == '1' and call('HGET', P .. 'job:' .. id, 'persisted_bytes')
      if bytes then count('budget', 't:' .. job.tenant .. ':persisted', tonumber(bytes)) end
      if job and not TERMINAL[job.state] then
        local what = job.state == 'queued' and ':waiting' or job.state == 'leased' and ':leased'
        if what then count('counters', queue_key(job) .. what, 1) end
        for _, who in ipairs({ 't:' .. job.tenant, 'p:' .. job.pool }) do
          count('budget', who .. ':jobs', 1)
          count('budget', who .. ':bytes', tonumber(job.size))
        end
      end
    end
  end
  for hash, fields in pairs(counted) do
    for field, value in pairs(fields) do
      local off = value - counter(hash, field)
      add(hash, field, off)
      if off ~= 0 then mended = mended + 1 end
    end
  end
end

local jobs = call('ZSCAN', P .. 'deadlines', ARGV[2], 'COUNT', JOBS)
for i = 1, #jobs[2], 2 do audit_job(jobs[2][i]) end
if call('ZCARD', P .. 'deadlines') + call('ZCARD', P .. 'persisted') <= MAX_RECOUNTED then recount() end
return answered({ jobs[1], mended + ghosts })
