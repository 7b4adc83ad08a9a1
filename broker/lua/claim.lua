-- Leases up to n jobs to a worker, or parks it.
-- ARGV: prefix, session id, seq, turn, n, offer (jobs that may be handed to the worker while it is parked, those of this
--       claim included), received (jobs handed to it so far, as it counts), attempt id base, park_ms, region ('' for none;
--       behind a = for a worker that takes only what waits for its region), number of the engine's cache in this session
--       (it rises as that forgets), slots in all, the most slots that it may have, then pairs: pool, lanes (comma
--       separated).
-- Reply: {'fenced'} if the session was declared dead (or never joined); else {'ok', parked (1 or 0), jobs handed to it so
--       far, jobs that may be handed to it still, job, ...}, each job {id, envelope, epoch, attempt id, attempt,
--       remaining_ms, waited_ms, suspect (1 or 0), predicted wait as it came (ms, or '')}. With fewer than n jobs the worker
--       is parked. The same (session, seq) again answers the same leases, as far as they are still held (if some are not, a wake tells the worker to claim
--       again); an older seq nothing. A reply that grows large ends early, and a wake does the same.
-- ``LANE_ORDERS``, ``BAND_ORDERS`` and ``REGION_FIRST`` (by turn) are made from queue_schemas/lanes.py.
-- Invariants: 3 fence, 5 order, 6 bounded starvation, 10 no start after expiry, 13 liveness (what is left wakes the next
--       worker).
-- uses: affinity, clock, endings, fairness, fence, lanes, parking, preemption
-- rarely: cancel_or_expire, claim_again, choose

local session_id, seq, worker_turn, wanted = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local offer, received = tonumber(ARGV[6]), tonumber(ARGV[7])
local attempt_base, park_ms, region = ARGV[8], tonumber(ARGV[9]), string.match(ARGV[10], '^=?(.*)')
local takes_others = region == ARGV[10]
local cache, slots, capacity = cache_of(session_id, ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
local MAX_SKIPPED = 64
local MAX_BYTES = 8 * 1024 * 1024 -- of envelopes in one reply
local MANY_QUEUES = 48 -- from here on a worker's entries among the parked stand for half of park_ms
local claimed_key = P .. 'claimed:' .. session_id
local now = now_ms()

if is_fenced(session_id) then return { 'fenced' } end

local last = call('HMGET', claimed_key, 'seq', 'jobs', 'parked', 'suspect', 'given', 'free', 'stands_until', 'full')
local given = tonumber(last[5] or 0)
local on_their_way = math.max(given - received, 0)
local answer = { 'ok', last[3] and not last[8] and 1 or 0, given, tonumber(last[6] or 0) }
wanted = math.max(wanted - on_their_way, 0)

-- Answers the digests of its prefix.
local function add_to_reply(job)
  local fields = call('HMGET', P .. 'job:' .. job.id, 'env', 'digests')
  answer[#answer + 1] = { job.id, fields[1], tonumber(job.epoch), job.aid, tonumber(job.attempts),
    math.max(tonumber(job.deadline) - now, 0), math.max(now - tonumber(job.at), 0), is_suspect(job) and 1 or 0,
    job.predicted }
  return fields[2] or ''
end

local function claim_again()
  call('XADD', P .. 'ctl:' .. session_id, 'NOMKSTREAM', '*', 'k', 'wake')
end

-- A late copy of an older claim, from a connection that was given up: its jobs would be leased to nobody.
if last[1] and tonumber(seq) < tonumber(last[1]) then return answer end
if last[1] == seq then
  local is_short = false
  for id, aid in string.gmatch(last[2], '(%S+) (%S+)') do
    local job = load_job(id)
    if job and job.state == 'leased' and job.aid == aid then add_to_reply(job) else is_short = true end
  end
  if is_short then claim_again() end -- it believes it is parked, and may not be
  return answer
end

-- ``shared_keys``: the queue keys without a region that the worker serves; ``local_keys``: these and its own region's.
local pools, shared_keys, local_keys, depths = {}, {}, {}, {}
for i = 14, #ARGV, 2 do
  pools[#pools + 1] = ARGV[i]
  for lane in string.gmatch(ARGV[i + 1], '[^,]+') do
    local key = ARGV[i] .. ':' .. lane
    shared_keys[key] = true
    if takes_others then local_keys[#local_keys + 1] = key end
    if region ~= '' then local_keys[#local_keys + 1] = key .. '@' .. region end
  end
end
for i, key in ipairs(local_keys) do depths[i] = key .. ':waiting' end
read('counters', depths)

local skipped = 0

-- The queued job behind an entry; nil, after cleaning up, if it is not to be run any more.
local function runnable(queue, entry)
  local job = job_of_entry(queue, entry)
  if job and tonumber(job.deadline) <= now then
    cancel_or_expire(job, 'expired', EXPIRED_WAITING)
  elseif job and nobody_waits(job) then
    cancel_or_expire(job, 'cancelled', NOBODY_WAITS, 'router_gone')
  elseif job then
    return job
  end
  skipped = skipped + 1
  return nil
end

local found_empty = {}

-- The first job of a stream that this worker did not give up lately.
local function take_from_stream(queue)
  local from = '-'
  for _ = 1, found_empty[queue] and 0 or MAX_SKIPPED / 16 do
    local entries = call('XRANGE', P .. queue, from, '+', 'COUNT', 16)
    for _, entry in ipairs(entries) do
      local job = runnable(queue, entry)
      if job and (job.avoid ~= session_id or tonumber(job.avoid_until) <= now) then return job end
    end
    if #entries < 16 then break end
    from = '(' .. entries[16][1]
  end
  found_empty[queue] = true
  return nil
end

local held_suspect = still_runs(last[4])

-- A job whose attempt was lost or handed back: a suspect, if this worker has none, or one of the others.
local function take_retry(key)
  local job = not held_suspect and take_from_stream('suspects:' .. key)
  return job or take_from_stream('retry:' .. key)
end

-- The job that this worker takes of a tenant that is due: the first, or one behind it that is warm here, as long as the
-- first has not waited longer than others did of late.
local function take_warmest(key, queue)
  local patience = counter('counters', key .. ':wait')
  local entries = call('XRANGE', P .. queue, '-', '+', 'COUNT', patience > 0 and LOOKAHEAD or 1)
  local first = entries[1] and runnable(queue, entries[1])
  if not first or not entries[2] or now - tonumber(first.at) >= patience then return first, entries[1] end
  local waiting_jobs = {}
  for i, entry in ipairs(entries) do waiting_jobs[i] = entry[2][6] or '' end
  local chosen = choose(waiting_jobs, cache)
  return chosen == 1 and first or chosen > 1 and runnable(queue, entries[chosen]) or nil, entries[1]
end

-- A new job of the tenant that was served least, and where that one stands.
local function take_fresh(key, turn)
  for _, band in ipairs(BAND_ORDERS[turn % #BAND_ORDERS + 1]) do
    local of_band = key .. ':' .. band
    while not found_empty[of_band] and skipped < MAX_SKIPPED do
      local heads = call('ZRANGE', P .. 'active:' .. of_band, 0, 0, 'WITHSCORES')
      local tenant, start = heads[1], heads[2]
      local queue = 'q:' .. of_band .. ':' .. (tenant or '')
      local job, entry = nil, nil
      if tenant then job, entry = take_warmest(key, queue) end
      if job then return job, tonumber(start) end
      if not entry and tenant then call('ZREM', P .. 'active:' .. of_band, tenant) end
      found_empty[of_band] = not tenant
    end
  end
  return nil
end

-- The next job of a queue key: retried work first, but for every fourth turn.
local function take(key)
  read('counters', { key .. ':turn', key .. ':wait' })
  local turn = counter('counters', key .. ':turn')
  local job, start = turn % 4 ~= 3 and take_retry(key) or nil, nil
  if not job then job, start = take_fresh(key, turn) end
  job = job or turn % 4 == 3 and take_retry(key)
  if job then
    add('counters', key .. ':turn', 1)
    if start then follow_wait(key, now - tonumber(job.at)) end -- that of a retry has its run in it
  end
  return job, start
end

-- A job of a queue key, or of this worker's region there, in turns.
local function take_at(key, turn)
  local own, is_own_first = key .. '@' .. region, REGION_FIRST[turn % #REGION_FIRST + 1]
  local order = region == '' and { key } or not takes_others and { own } or is_own_first and { own, key } or { key, own }
  for _, at in ipairs(order) do
    if skipped < MAX_SKIPPED and waiting(at) > 0 then
      local job, start = take(at)
      if job then return job, start end
    end
  end
  return nil
end

local function next_job(turn)
  for _, lane in ipairs(LANE_ORDERS[turn % #LANE_ORDERS + 1]) do
    for i = 0, #pools - 1 do
      local key = pools[(turn + i) % #pools + 1] .. ':' .. lane
      if shared_keys[key] then
        local job, start = take_at(key, turn)
        if job then return job, start end
      end
    end
  end
  return nil
end

local held, given_bytes = {}, 0
while #held < wanted and #pools > 0 and given_bytes < MAX_BYTES do
  local job, start = next_job(worker_turn + #held)
  if not job then break end
  leave_queue(job, start and start + charge_of(job))
  local waited_for = string.match(job.lane, '@.*') or ''
  job.attempts, job.aid, job.lane = int(tonumber(job.attempts) + 1), attempt_base .. #held, without_region(job.lane)
  job.owner, job.queue, job.entry, job.charged = session_id, '', '', '0'
  if not start then correct(job, tonumber(job.cost)) end
  job.charged = exact(charge_of(job)) .. waited_for
  note_start(job, now, ARGV[10])
  transition(job, 'leased')
  if job.persisted == '1' then call('HSETNX', P .. 'job:' .. job.id, 'started', int(now)) end
  gather('HSET', P .. 'leases:' .. session_id, job.id, job.epoch)
  add('counters', queue_key(job) .. ':leased', 1)
  held[#held + 1] = job.id .. ' ' .. job.aid
  if is_suspect(job) then
    held_suspect = true
    call('HSET', claimed_key, 'suspect', held[#held])
  end
  given_bytes = given_bytes + tonumber(job.size)
  remember(job, add_to_reply(job), cache)
end

local free, parked_at = 0, nil
if #held < wanted and (skipped >= MAX_SKIPPED or given_bytes >= MAX_BYTES) then
  claim_again()
  unpark(session_id, last[3])
elseif #held < wanted then
  free, parked_at = math.max(offer - on_their_way - #held, 0), table.concat(local_keys, ' ')
  local stands = free > 0 and last[3] == parked_at and tonumber(last[7] or 0) > now
  if last[3] ~= parked_at or free == 0 then unpark(session_id, last[3]) end
  local load = string.format('%.9f', load_of(slots, free, capacity))
  for _, key in ipairs(stands and {} or local_keys) do
    call('ZADD', P .. 'parked:' .. key, int(now + park_ms), session_id)
    if free > 0 then call('ZADD', P .. 'offers:' .. key, load, session_id) end
  end
  if not stands and free > 0 and #local_keys >= MANY_QUEUES then
    call('HSET', claimed_key, 'stands_until', int(now + park_ms / 2))
  end
else
  unpark(session_id, last[3])
  local woke = false
  for _, key in ipairs(local_keys) do woke = woke or waiting(key) > 0 and wake(key, now) end
end
if last[8] then call('HDEL', claimed_key, 'full') end
answer[2], answer[4] = parked_at and 1 or 0, free
call('HSET', claimed_key, 'seq', seq, 'jobs', table.concat(held, ' '), 'free', int(free), 'cache', ARGV[11],
  'slots', ARGV[12], 'capacity', ARGV[13], unpack(parked_at and { 'parked', parked_at } or {}))
if region ~= '' then call('HSET', claimed_key, 'region', ARGV[10]) end
return write_counters_and_return(answer)
