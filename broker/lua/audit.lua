-- Compares a part of what is counted and indexed with what is there, and makes it the same: a server that evicted keys, or
-- an operator who deleted some, took records, streams and counters apart. The next call goes on.
-- ARGV: prefix, cursor among the deadlines, cursor among the workers, number of the queue key to begin with.
-- Reply: {cursor, cursor, number, what was mended}: where to go on; '0', '0' and 0 after a whole round.
-- Invariants: 1 no lost job, 8 bounded memory, 12 conservation.
-- uses: attempts, fence

local JOBS, WORKERS, QUEUE_KEYS = 128, 8, 8 -- looked at in one call
local MAX_LEASES, MAX_TENANTS = 1024, 256 -- of a worker, and of a band, beyond which they are passed over
local MAX_GHOSTS = 512 -- entries without a job that one call removes
local MAX_RECOUNTED = 256 -- live and persisted jobs of a shard up to which all of its counters are made anew
local now = now_ms()
local mended = 0

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
    call('HSET', P .. 'leases:' .. job.owner, id, job.epoch .. ' ' .. queue_key(job) .. ' ' .. accounts(job))
  elseif job.state == 'lost' and not call('ZSCORE', P .. 'lost', id) then
    call('ZADD', P .. 'lost', int(now), id)
  else
    return
  end
  mended = mended + 1
end

local jobs = call('ZSCAN', P .. 'deadlines', ARGV[2], 'COUNT', JOBS)
for i = 1, #jobs[2], 2 do audit_job(jobs[2][i]) end

-- Leases without a job.
local workers = call('HSCAN', P .. 'beats', ARGV[3], 'COUNT', WORKERS)
for i = 1, #workers[2], 2 do
  local owner = workers[2][i]
  local held = call('HLEN', P .. 'leases:' .. owner) <= MAX_LEASES and call('HGETALL', P .. 'leases:' .. owner) or {}
  for k = 1, #held, 2 do
    local found = call('HMGET', P .. 'job:' .. held[k], 'state', 'owner')
    if found[1] ~= 'leased' or found[2] ~= owner then
      drop_lease(owner, held[k], held[k + 1])
      mended = mended + 1
    end
  end
end

-- Entries without a job at the head of a stream.
local ghosts = 0
local function drop_ghosts(queue)
  while ghosts < MAX_GHOSTS do
    local entry = call('XRANGE', P .. queue, '-', '+', 'COUNT', 1)[1]
    local found = entry and call('HMGET', P .. 'job:' .. entry[2][2], 'state', 'entry')
    if not entry or found[1] == 'queued' and found[2] == entry[1] then return end
    drop_entry(queue, entry)
    ghosts = ghosts + 1
  end
end

local function correct(hash, field, value)
  local off = value - counter(hash, field)
  if off == 0 then return end
  add(hash, field, off)
  mended = mended + 1
end

-- What waits at a queue key is what its streams hold.
local keys = {}
for _, field in ipairs(call('HKEYS', P .. 'counters')) do keys[#keys + 1] = string.match(field, '^(.*):waiting$') end
table.sort(keys)
local from = tonumber(ARGV[4])
for i = from + 1, math.min(from + QUEUE_KEYS, #keys) do
  local queues, held = streams_at(keys[i], MAX_TENANTS), 0
  for _, queue in ipairs(queues or {}) do
    drop_ghosts(queue)
    held = held + call('XLEN', P .. queue)
  end
  if queues then correct('counters', keys[i] .. ':waiting', held) end
end
local go_on = from + QUEUE_KEYS < #keys and from + QUEUE_KEYS or 0

-- A small shard's counters are made anew from the records: what a lost record or counter was is known no other way.
local function recount()
  local counted = { budget = {}, counters = {} }
  local function count(hash, field, by) counted[hash][field] = (counted[hash][field] or 0) + by end
  for hash, fields in pairs(counted) do
    for _, field in ipairs(call('HKEYS', P .. hash)) do
      local is_live = hash == 'budget' and field ~= 'dead:bytes' or string.find(field, ':waiting$') or string.find(field, ':leased$')
      if is_live then fields[field] = 0 end
    end
  end
  for _, index in ipairs({ 'deadlines', 'persisted' }) do
    for _, id in ipairs(call('ZRANGE', P .. index, 0, -1)) do
      local job = load_job(id)
      local bytes = job and tonumber(call('HGET', P .. 'job:' .. id, 'persisted_bytes') or 0) or 0
      if bytes > 0 then count('budget', 't:' .. job.tenant .. ':persisted', bytes) end
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
    for field, value in pairs(fields) do correct(hash, field, value) end
  end
end

if call('ZCARD', P .. 'deadlines') + call('ZCARD', P .. 'persisted') <= MAX_RECOUNTED
  and call('HLEN', P .. 'budget') + call('HLEN', P .. 'counters') <= 16 * MAX_RECOUNTED then
  recount()
end
return answered({ jobs[1], workers[1], go_on, mended + ghosts })
