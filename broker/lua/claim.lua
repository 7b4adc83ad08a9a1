-- Gives a worker up to n jobs, or parks it.
-- ARGV: prefix, incarnation, seq, turn, n, attempt id base, park_ms, then pairs: pool, lanes (comma separated).
-- Reply: {'fenced'} if the incarnation was declared dead (or never joined); else {'ok', job, ...}, each job
--       {id, envelope, epoch, attempt id, attempt, remaining_ms, waited_ms}. Fewer than n jobs: the worker is parked.
--       The same (incarnation, seq) again answers the same leases, as far as they are still held; an older seq nothing.
--       A reply that grows large ends early, and a wake tells the worker to claim again.
-- The order of lanes and bands is that of queue_schemas/lanes.py.
-- Invariants: 3 fence (a reclaimed incarnation gets nothing), 5 order, 6 bounded starvation, 10 no start after expiry,
--       13 liveness (what is left wakes the next worker).

local incarnation, seq, turn, wanted = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local attempt_base, park_ms = ARGV[6], tonumber(ARGV[7])
local LANES = { 'interactive', 'background', 'batch' }
local MAX_SKIPPED = 64
local MAX_BYTES = 8 * 1024 * 1024 -- of envelopes in one reply, past which the worker claims again
local now = now_ms()

if is_fenced(incarnation) then return { 'fenced' } end

local answer = { 'ok' }
local claimed_key = P .. 'claimed:' .. incarnation
local last = call('HMGET', claimed_key, 'seq', 'jobs', 'parked')

local function give(job)
  answer[#answer + 1] = { job.id, job.env, tonumber(job.epoch), job.aid, tonumber(job.attempts),
    math.max(tonumber(job.deadline) - now, 0), math.max(now - tonumber(job.at), 0) }
end

-- A late copy of an older claim, from a connection that was given up: its jobs would be leased to nobody.
if last[1] and tonumber(seq) < tonumber(last[1]) then return answer end
if last[1] == seq then
  for id, aid in string.gmatch(last[2], '(%S+) (%S+)') do
    local job = load_job(id)
    if job and job.state == 'leased' and job.aid == aid then
      job.env = call('HGET', P .. 'job:' .. id, 'env')
      give(job)
    end
  end
  return answer
end

local pools, serves, waiting, asked = {}, {}, {}, {}
for i = 8, #ARGV, 2 do
  pools[#pools + 1] = ARGV[i]
  for lane in string.gmatch(ARGV[i + 1], '[^,]+') do
    local where = ARGV[i] .. ':' .. lane
    serves[#serves + 1] = where
    asked[#asked + 1] = where .. ':waiting'
  end
end
if #asked > 0 then
  for i, depth in ipairs(call('HMGET', P .. 'depth', unpack(asked))) do waiting[serves[i]] = tonumber(depth or 0) end
end

local function lane_order(t)
  if t % 16 == 15 then return { 'batch', 'interactive', 'background' } end
  if t % 8 == 7 then return { 'background', 'interactive', 'batch' } end
  return LANES
end

local function band_order(t)
  if t % 4 ~= 3 then return { 0, 1, 2, 3 } end
  local first = math.floor(t / 4) % 3 + 1
  local order = { first }
  for band = 0, 3 do
    if band ~= first then order[#order + 1] = band end
  end
  return order
end

local skipped = 0

-- The queued job behind an entry; nil, after cleaning up, if it is not to be run any more.
local function runnable(id, queue, entry)
  local job = load_job(id)
  if not job or job.state ~= 'queued' or job.entry ~= entry then
    call('XDEL', P .. queue, entry)
    if call('XLEN', P .. queue) == 0 then call('DEL', P .. queue) end
    skipped = skipped + 1
    return nil
  end
  if tonumber(job.deadline) <= now then
    cancel_queued(job, 'expired', 'its time ran out in the queue')
  elseif nobody_waits(job) then
    cancel_queued(job, 'cancelled', 'nobody waits for the answer')
  else
    return job
  end
  waiting[place(job)] = waiting[place(job)] - 1
  skipped = skipped + 1
  return nil
end

local nothing_lost = {}

local function take_retry(where)
  if nothing_lost[where] then return nil end
  local queue = 'retry:' .. where
  for _, entry in ipairs(call('XRANGE', P .. queue, '-', '+', 'COUNT', 16)) do
    local job = runnable(entry[2][2], queue, entry[1])
    if job and (job.avoid ~= incarnation or tonumber(job.avoid_until) <= now) then return job end
  end
  nothing_lost[where] = true
  return nil
end

-- One unit of service for a tenant. A tenant that waits alone is not charged: it takes nothing from anybody, and those
-- who come start level with it.
local function charge(where, tenant, start)
  local service = P .. 'service:' .. where
  call('ZADD', P .. 'active:' .. where, 'XX', int(start + 1), tenant)
  call('ZREMRANGEBYSCORE', service, '-inf', '(' .. int(start))
  call('ZADD', service, int(start), '*', int(start + 1), tenant)
  call('PEXPIRE', service, 3600000)
end

local nobody_in = {} -- bands that this call has found empty

-- The job of the tenant that was served least, by start-time fair queueing with one unit a job
-- (Goyal, Vin, Cheng: Start-time Fair Queueing, SIGCOMM 1996).
local function take_fresh(where, t)
  for _, band in ipairs(band_order(t)) do
    local active = P .. 'active:' .. where .. ':' .. band
    while not nobody_in[active] and skipped < MAX_SKIPPED do
      local head = call('ZRANGE', active, 0, 1, 'WITHSCORES')
      local tenant = head[1]
      if not tenant then
        nobody_in[active] = true
        break
      end
      local queue = 'q:' .. where .. ':' .. band .. ':' .. tenant
      local entry = call('XRANGE', P .. queue, '-', '+', 'COUNT', 1)[1]
      if not entry then
        call('ZREM', active, tenant)
      else
        local job = runnable(entry[2][2], queue, entry[1])
        if job then
          if head[3] then charge(where .. ':' .. band, tenant, tonumber(head[2])) end
          return job
        end
      end
    end
  end
  return nil
end

local turns = {}

local function take(where)
  turns[where] = turns[where] or tonumber(call('HGET', P .. 'turns', where) or 0)
  local t = turns[where]
  local retry_first = t % 4 ~= 3
  local job = retry_first and take_retry(where) or take_fresh(where, t)
  if not job and not retry_first then job = take_retry(where) end
  if job then
    turns[where] = t + 1
    add('turns', where, 1)
  end
  return job
end

local function next_job(t)
  for _, lane in ipairs(lane_order(t)) do
    for p = 0, #pools - 1 do
      local where = pools[(t + p) % #pools + 1] .. ':' .. lane
      if (waiting[where] or 0) > 0 and skipped < MAX_SKIPPED then
        local job = take(where)
        if job then return job end
      end
    end
  end
  return nil
end

local held, given_bytes = {}, 0
while #held < wanted and #pools > 0 and given_bytes < MAX_BYTES do
  local job = next_job(turn + #held)
  if not job then break end
  local where = place(job)
  leave_queue(job)
  waiting[where] = waiting[where] - 1
  job.attempts = int(tonumber(job.attempts) + 1)
  job.aid = attempt_base .. int(#held)
  call('HSET', P .. 'job:' .. job.id, 'state', 'leased', 'aid', job.aid, 'attempts', job.attempts, 'owner', incarnation)
  call('HSET', P .. 'leases:' .. incarnation, job.id, job.epoch)
  add('depth', where .. ':leased', 1)
  held[#held + 1] = job.id .. ' ' .. job.aid
  given_bytes = given_bytes + tonumber(job.size)
  job.env = call('HGET', P .. 'job:' .. job.id, 'env')
  give(job)
end
call('HSET', claimed_key, 'seq', seq, 'jobs', table.concat(held, ' '))

local function leave_parking()
  if not last[3] then return end
  for where in string.gmatch(last[3], '%S+') do call('ZREM', P .. 'parked:' .. where, incarnation) end
  call('HDEL', claimed_key, 'parked')
end

if #held < wanted and (skipped >= MAX_SKIPPED or given_bytes >= MAX_BYTES) then
  call('XADD', P .. 'ctl:' .. incarnation, 'NOMKSTREAM', '*', 'k', 'wake')
elseif #held < wanted then
  local places = table.concat(serves, ' ')
  if last[3] ~= places then
    leave_parking()
    call('HSET', claimed_key, 'parked', places)
  end
  for _, where in ipairs(serves) do
    call('ZADD', P .. 'parked:' .. where, int(now + park_ms), incarnation)
  end
else
  leave_parking()
  for _, where in ipairs(serves) do
    if waiting[where] > 0 and wake_one(where, now) then break end
  end
end
return answered(answer)
