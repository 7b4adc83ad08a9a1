-- Puts jobs on their queues and wakes one parked worker for each, of the job's region if it has one. Then somebody
-- remote is told to look when the job's patience is over, unless somebody was told already.
-- ARGV: prefix, tenant_jobs, tenant_bytes, pool_jobs, pool_bytes (limits on live jobs and bytes), tenant_kept (limit on
--       kept bytes of stored jobs), then per job: id, envelope, pool, lane, band, tenant, reply (of a stored job: its
--       first listener), stored, ttl_ms, max_attempts, region, remote_after_ms, resume (1: when an attempt is lost, its Router
--       says where it goes on), and for stored jobs, else empty: keep_ms, digest of the idempotency key ('' for none),
--       digest of the request, listed (1: it is kept however it ends, and stands in its tenant's list), notify (a word:
--       its end is put on the shard's stream of ends), job metadata (what is kept of the request, opaque).
-- Reply: per job 'queued', or the state of a job of that id that is already known (tombstones included: a job
--       cancelled before it came is void), or 'over <budget>' where nothing was written. Where another job holds the
--       idempotency key: 'other <job id> <state>', or 'mismatch' if its request is another one.
-- Invariants: 1 no lost job, 4 idempotency, 8 bounded memory, 12 conservation, 13 liveness.

local now = now_ms()
local limits = { tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]) }
local kept_limit = tonumber(ARGV[6])
local spent, came = {}, {} -- budgets as read at first sight; jobs and bytes that this call has added since

local function spend(who, size)
  local sums = came[who] or { 0, 0 }
  came[who] = { sums[1] + 1, sums[2] + size }
  add('budget', who .. ':jobs', 1)
  add('budget', who .. ':bytes', size)
end

local function over_budget(tenant, pool, size)
  local who = tenant .. ' ' .. pool
  local used = spent[who] or call('HMGET', P .. 'budget', 't:' .. tenant .. ':jobs', 't:' .. tenant .. ':bytes',
    'p:' .. pool .. ':jobs', 'p:' .. pool .. ':bytes')
  spent[who] = used
  local own, shared = came['t:' .. tenant] or { 0, 0 }, came['p:' .. pool] or { 0, 0 }
  if tonumber(used[1] or 0) + own[1] + 1 > limits[1] then return 'tenant_jobs' end
  if tonumber(used[2] or 0) + own[2] + size > limits[2] then return 'tenant_bytes' end
  if tonumber(used[3] or 0) + shared[1] + 1 > limits[3] then return 'pool_jobs' end
  if tonumber(used[4] or 0) + shared[2] + size > limits[4] then return 'pool_bytes' end
  return nil
end

-- The job that holds an idempotency key, as the reply says it; nil if there is none any more.
local function holder(idem, request)
  local id, theirs = string.match(call('GET', P .. 'idem:' .. idem) or '', '^(%S+) (%S+)$')
  local state = id and call('HGET', P .. 'job:' .. id, 'state')
  if not state then return nil end
  return theirs == request and 'other ' .. id .. ' ' .. state or 'mismatch'
end

-- What a new stored job has beside its record.
local function store(job, router, deadline, keep, idem, request, listed, notify, job_metadata)
  call('DEL', P .. 'out:' .. job.id, P .. 'listeners:' .. job.id)
  call('HSET', P .. 'job:' .. job.id, 'keep', keep, 'idem', idem)
  stored().count(job, STORED_BYTES + string.len(job_metadata))
  if job_metadata ~= '' then call('HSET', P .. 'job:' .. job.id, 'job_metadata', job_metadata, 'listed', listed, 'notify', notify) end
  if listed == '1' then stored().list(job, now, deadline, keep) end
  if idem ~= '' then
    call('SET', P .. 'idem:' .. idem, job.id .. ' ' .. request, 'PX',
      int(tonumber(deadline) - now + tonumber(keep) + EXPIRY_SLACK_MS))
  end
  if router ~= '' then stored().listen(job.id, router, deadline) end
end

-- A tenant that comes (back) to a band starts at the band's clock, or where its last job ended if that is later:
-- leaving and returning gains nothing.
local function activate(where, tenant)
  local active = P .. 'active:' .. where
  if call('ZSCORE', active, tenant) then return end
  local service = P .. 'service:' .. where
  local clock = tonumber(call('ZSCORE', service, '*') or 0)
  local ended = tonumber(call('ZSCORE', service, tenant) or 0)
  -- The clock is forgotten after an hour without competition; who waits then sets it.
  local least = tonumber(call('ZRANGE', active, 0, 0, 'WITHSCORES')[2] or 0)
  call('ZADD', active, int(math.max(clock, ended, least)), tenant)
end

local answers = {}
for i = 7, #ARGV, 19 do
  local id, envelope, pool, lane, band = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local tenant, reply, is_stored, ttl, max = ARGV[i + 5], ARGV[i + 6], ARGV[i + 7] == '1', ARGV[i + 8], ARGV[i + 9]
  local region, patience, resume = ARGV[i + 10], ARGV[i + 11], ARGV[i + 12]
  local keep, idem, request = ARGV[i + 13], ARGV[i + 14], ARGV[i + 15]
  local listed, notify, job_metadata = ARGV[i + 16], ARGV[i + 17], ARGV[i + 18]
  local key = P .. 'job:' .. id
  local size = string.len(envelope)
  local known = call('HGET', key, 'state')
  local other = not known and idem ~= '' and holder(idem, request)
  local over = not (known or other) and over_budget(tenant, pool, size)
  if is_stored and not (known or other or over)
    and counter('budget', 't:' .. tenant .. ':kept') + STORED_BYTES + string.len(job_metadata) > kept_limit then
    over = 'tenant_kept'
  end
  if known then
    if is_stored and reply ~= '' and not TERMINAL[known] then
      stored().listen(id, reply, call('HGET', key, 'deadline'))
    end
    answers[#answers + 1] = known
  elseif other then
    answers[#answers + 1] = other
  elseif over then
    answers[#answers + 1] = 'over ' .. over
  else
    local deadline = int(now + tonumber(ttl))
    local of_region = region ~= '' and regional().name(region, tonumber(deadline), now)
    local part = of_region and lane .. '@' .. region or lane
    local where = pool .. ':' .. part
    local queue = 'q:' .. where .. ':' .. band .. ':' .. tenant
    local entry = call('XADD', P .. queue, '*', 'id', id, 'of', tenant .. ' ' .. int(size))
    activate(where .. ':' .. band, tenant)
    call('HSET', key, 'env', envelope, 'state', 'queued', 'epoch', '1', 'aid', '', 'attempts', '0', 'max', max,
      'pool', pool, 'lane', part, 'band', band, 'tenant', tenant, 'reply', is_stored and '' or reply, 'stored', is_stored and '1' or '0',
      'deadline', deadline, 'size', int(size), 'at', int(now), 'queue', queue, 'entry', entry)
    if resume == '1' then call('HSET', key, 'resume', resume) end
    if is_stored then store({ id = id, tenant = tenant }, reply, deadline, keep, idem, request, listed, notify, job_metadata) end
    call('ZADD', P .. 'deadlines', deadline, id)
    spend('t:' .. tenant, size)
    spend('p:' .. pool, size)
    add('depth', where .. ':waiting', 1)
    add('totals', pool .. ':' .. lane .. ':enqueued', 1)
    wake_one(where, now)
    if of_region then
      local free = now + tonumber(patience)
      call('HSET', key, 'free', int(free))
      regional().ensure_watch(pool, part, free, now)
      regional().keep_watches(pool, tonumber(deadline), now)
    end
    answers[#answers + 1] = 'queued'
  end
end
return answered(answers)
