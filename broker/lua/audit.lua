-- Compares a part of what is counted and indexed with what is there, and makes it the same: a server that evicted keys, or
-- an operator who deleted some, took records, streams and counters apart. A few looks a call; the next one goes on.
-- ARGV: prefix, cursor among the deadlines, cursor among the workers, number of the place to begin with.
-- Reply: {cursor, cursor, number, what was mended}: where to go on; '0', '0' and 0 after a whole round.
-- Invariants: 1 no lost job, 8 bounded memory, 12 conservation.

local LOOKED_AT = 128 -- jobs in one call
local WORKERS = 8
local MAX_LEASES = 1024 -- of a worker
local PLACES = 8
local MAX_TENANTS = 256 -- that wait at a place, beyond which its streams are not counted
local MAX_GHOSTS = 512 -- entries without a job that one call removes
local MAX_RECOUNTED = 256 -- live and kept jobs of a shard up to which all of its counters are made anew

local now = now_ms()
local mended = 0

-- Every live job stands among the deadlines; so must it in its stream, its worker's leases, or among the lost.
local function audit_job(id)
  local job = load_job(id)
  if not job or TERMINAL[job.state] then
    call('ZREM', P .. 'deadlines', id)
  elseif job.state == 'queued' and not call('XRANGE', P .. job.queue, job.entry, job.entry)[1] then
    add('depth', place(job) .. ':waiting', -1)
    job.lane = lane_and_region(job.lane)
    call('HSET', P .. 'job:' .. id, 'lane', job.lane, wait_again(job))
    wake_one(place(job), now)
  elseif job.state == 'leased' and is_fenced(job.owner) then
    if give_up(job, false, 'its worker is not known any more', now) == 'requeued' then wake_one(place(job), now) end
  elseif job.state == 'leased' and call('HEXISTS', P .. 'leases:' .. job.owner, id) == 0 then
    call('HSET', P .. 'leases:' .. job.owner, id, job.epoch .. ' ' .. place(job) .. ' ' .. accounts(job))
  elseif job.state == 'lost' and not call('ZSCORE', P .. 'lost', id) then
    call('ZADD', P .. 'lost', int(now), id)
  else
    return
  end
  mended = mended + 1
end

local at = call('ZSCAN', P .. 'deadlines', ARGV[2], 'COUNT', LOOKED_AT)
for i = 1, #at[2], 2 do audit_job(at[2][i]) end

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
    local entries = call('XRANGE', P .. queue, '-', '+', 'COUNT', 16)
    for _, entry in ipairs(entries) do
      local found = call('HMGET', P .. 'job:' .. entry[2][2], 'state', 'entry')
      if found[1] == 'queued' and found[2] == entry[1] then return end
      drop_entry(queue, entry)
      ghosts = ghosts + 1
    end
    if #entries < 16 then return end
  end
end

-- What waits at a place is what its streams hold.
local function audit_place(where)
  local queues = { 'retry:' .. where, 'suspects:' .. where }
  for band = 0, 3 do
    local active = P .. 'active:' .. where .. ':' .. band
    if call('ZCARD', active) > MAX_TENANTS then return end
    for _, tenant in ipairs(call('ZRANGE', active, 0, -1)) do
      queues[#queues + 1] = 'q:' .. where .. ':' .. band .. ':' .. tenant
    end
  end
  local waiting = 0
  for _, queue in ipairs(queues) do
    drop_ghosts(queue)
    waiting = waiting + call('XLEN', P .. queue)
  end
  local off = waiting - counter('depth', where .. ':waiting')
  if off ~= 0 then
    add('depth', where .. ':waiting', off)
    mended = mended + 1
  end
end

local places = {}
for _, field in ipairs(call('HKEYS', P .. 'depth')) do
  local where = string.match(field, '^(.*):waiting$')
  if where then places[#places + 1] = where end
end
table.sort(places)
local from = tonumber(ARGV[4])
for i = from + 1, math.min(from + PLACES, #places) do audit_place(places[i]) end
local go_on = from + PLACES < #places and from + PLACES or 0

-- A small shard's counters are made anew from the records: what a lost record or counter was is known no other way.
local function recount()
  local depths, budgets = {}, {}
  local function count(hash, field, by) hash[field] = (hash[field] or 0) + by end
  for _, id in ipairs(call('ZRANGE', P .. 'deadlines', 0, -1)) do
    local found = call('HMGET', P .. 'job:' .. id, 'state', 'pool', 'lane', 'tenant', 'size', 'kept')
    if found[1] and found[2] and not TERMINAL[found[1]] then
      if found[1] == 'leased' then count(depths, found[2] .. ':' .. found[3] .. ':leased', 1) end
      if found[1] == 'queued' then count(depths, found[2] .. ':' .. found[3] .. ':waiting', 1) end
      count(budgets, 't:' .. found[4] .. ':jobs', 1)
      count(budgets, 't:' .. found[4] .. ':bytes', tonumber(found[5]))
      count(budgets, 'p:' .. found[2] .. ':jobs', 1)
      count(budgets, 'p:' .. found[2] .. ':bytes', tonumber(found[5]))
      if found[6] then count(budgets, 't:' .. found[4] .. ':kept', tonumber(found[6])) end
    end
  end
  for _, id in ipairs(call('ZRANGE', P .. 'kept', 0, -1)) do
    local found = call('HMGET', P .. 'job:' .. id, 'tenant', 'kept')
    if found[1] and found[2] then count(budgets, 't:' .. found[1] .. ':kept', tonumber(found[2])) end
  end
  for hash, counted in pairs({ depth = depths, budget = budgets }) do
    for _, field in ipairs(call('HKEYS', P .. hash)) do counted[field] = counted[field] or 0 end
    counted['dead:bytes'] = nil -- not of live jobs
    for field, value in pairs(counted) do
      local off = value - counter(hash, field)
      if off ~= 0 then
        add(hash, field, off)
        mended = mended + 1
      end
    end
  end
end

if call('ZCARD', P .. 'deadlines') + call('ZCARD', P .. 'kept') <= MAX_RECOUNTED
  and call('HLEN', P .. 'budget') <= 4 * MAX_RECOUNTED and call('HLEN', P .. 'depth') <= 4 * MAX_RECOUNTED then
  recount()
end
return answered({ at[1], workers[1], go_on, mended + ghosts })
