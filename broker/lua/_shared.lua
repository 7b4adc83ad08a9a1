-- What every script shares; each script is this text followed by its own.
-- KEYS[1] is a key of the shard (it routes the call on Redis Cluster); ARGV[1] is the prefix of the shard's keys.
-- Pool and tenant names arrive percent-encoded. Scripts read hash fields, never msgpack.
-- A script does not roll back: it reads and decides first, and writes only what cannot fail.
--
-- A waiting job stands at a place: ``<pool>:<lane>``, or ``<pool>:<lane>@<region>`` if workers of that region go first.
-- Its record's lane holds the part behind the pool. Once claimed, a job is of no region any more.

local P = ARGV[1]
local call = redis.call
local unpack = unpack or table.unpack
local TOMBSTONE_MS = 60000
local CONTROL_TTL_MS = 60000
-- The server ends keys by its own clock, which may step. Keys whose end matters are ended by scripts, on the queue's
-- clock; their expiry is for what nobody removed, and so much later.
local EXPIRY_SLACK_MS = 86400000
local CLOCK_GAP_MS = 10000 -- no time that passes between two calls of a fleet is longer: beyond it the clock stepped
local CLOCK_GAP_COUNTS_MS = 1000 -- what counts of such a gap, until somebody who measured it says more
local CLOCK_WRITTEN_MS = 200
local RETRY_APART_MS = 2000
local REGION_MEMORY_MS = 3600000
local MAX_REGIONS = 64
local LATE_MS = 100 -- how late the worker that watches a region's jobs from remote may look
local LOST_MS = 5000 -- how long until a Router is asked again where a lost stream goes on
local NOBODY_WAITS = 'nobody waits for the answer'
local RUN_EPOCHS = 2 ^ 20 -- epochs of one run of the server; those that it lost were never so many
local SUSPECT = 2 -- suspicion at which a job is run beside no other such job
local DEAD_AGE_MS = 7 * 24 * 3600 * 1000
local DEAD_BYTES = 256 * 1024 * 1024
local STORED_BYTES = 1024 -- what a stored job counts for in its tenant's kept bytes, beside its job_metadata and output
local MAX_ENDED = 100000 -- notices of ends that nobody has taken; beyond it the oldest are dropped
local TERMINAL = { done = true, failed = true, dead = true, cancelled = true, expired = true }
local FIELDS = { 'state', 'epoch', 'aid', 'attempts', 'max', 'owner', 'pool', 'lane', 'band', 'tenant', 'reply',
  'stored', 'deadline', 'size', 'at', 'queue', 'entry', 'ended', 'avoid', 'avoid_until', 'resume', 'suspicion', 'spared', 'cleared' }

local function int(number)
  return string.format('%.0f', number)
end

local function server_ms()
  local time = call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local clock = nil

-- The queue's clock, in ms: it goes on from where it stood when the server's own steps, in either direction, and so
-- across restarts and failovers. ``clock`` holds the server's time and the queue's when that was last written.
-- ``at_least``: somebody measured on a clock of his own that it is so late.
local function now_ms(at_least)
  if clock and not at_least then return clock end
  local server = server_ms()
  local was_server, was = string.match(call('GET', P .. 'clock') or '', '^(%d+) (%d+)$')
  was_server, was = tonumber(was_server or server), tonumber(was or 0)
  local passed = server - was_server
  if passed < 0 then
    passed = 0
  elseif passed > CLOCK_GAP_MS then
    passed = CLOCK_GAP_COUNTS_MS
  end
  clock = was == 0 and server or was + passed
  if at_least then clock = math.max(clock, at_least) end
  if was == 0 or at_least or server < was_server or server - was_server >= CLOCK_WRITTEN_MS then
    call('SET', P .. 'clock', int(server) .. ' ' .. int(clock))
  end
  return clock
end

-- The record of a job as a table, without its envelope; nil if there is none.
local function load_job(id)
  local values = call('HMGET', P .. 'job:' .. id, unpack(FIELDS))
  if not values[1] then return nil end
  local job = { id = id }
  for i, name in ipairs(FIELDS) do job[name] = values[i] or '' end
  return job
end

-- Changes of counters gather while the script runs and are written once, by ``answered``, with which every script that
-- changes anything returns.
local changes = { budget = {}, depth = {}, totals = {}, turns = {} }

local function add(hash, field, by)
  changes[hash][field] = (changes[hash][field] or 0) + by
end

local function counter(hash, field)
  return tonumber(call('HGET', P .. hash, field) or 0) + (changes[hash][field] or 0)
end

local freed_leases, freed_deadlines = {}, {}

local function answered(reply)
  for hash, fields in pairs(changes) do
    local names, set, gone = {}, {}, {}
    for field, by in pairs(fields) do
      if by ~= 0 then names[#names + 1] = field end
    end
    local before = #names > 0 and call('HMGET', P .. hash, unpack(names))
    for i, field in ipairs(names) do
      local value = tonumber(before[i] or 0) + fields[field]
      if value == 0 then
        gone[#gone + 1] = field
      else
        set[#set + 1] = field
        set[#set + 1] = int(value)
      end
    end
    if #set > 0 then call('HSET', P .. hash, unpack(set)) end
    if #gone > 0 then call('HDEL', P .. hash, unpack(gone)) end
  end
  -- A worker may have had thousands, and Lua passes 8000 arguments at most.
  for owner, ids in pairs(freed_leases) do
    for from = 1, #ids, 1000 do
      call('HDEL', P .. 'leases:' .. owner, unpack(ids, from, math.min(from + 999, #ids)))
    end
  end
  for from = 1, #freed_deadlines, 1000 do
    call('ZREM', P .. 'deadlines', unpack(freed_deadlines, from, math.min(from + 999, #freed_deadlines)))
  end
  return reply
end

local function place(job)
  return job.pool .. ':' .. job.lane
end

-- The lane of a place's part behind the pool, and its region (nil if it has none).
local function lane_and_region(part)
  local lane, region = string.match(part, '^(%a+)@(.+)$')
  return lane or part, region
end

local function total(job, event)
  add('totals', place(job) .. ':' .. event, 1)
end

-- What only calls that meet stored jobs need, made on demand. Such a job has no one reply stream but any number of
-- listeners: Routers that are sent what is added to its output.
local stored_tools = nil

local function stored()
  if stored_tools then return stored_tools end

  local function listeners_key(id)
    return P .. 'listeners:' .. id
  end

  -- From now on a Router is told what becomes of a live job.
  local function listen(id, router, deadline)
    call('SADD', listeners_key(id), router)
    call('PEXPIRE', listeners_key(id), int(math.max(tonumber(deadline) - now_ms(), 0) + EXPIRY_SLACK_MS))
  end

  -- Who listens to a job, also after it ended in this call.
  local function listeners_of(job)
    job.listeners = job.listeners or call('SMEMBERS', listeners_key(job.id))
    return job.listeners
  end

  -- Writes an entry for a Router that listens to these jobs; one that is gone listens no more.
  local function send(router, field, value, ids)
    if call('XADD', P .. 'reply:' .. router, 'NOMKSTREAM', '*', field, value) then return end
    for _, id in ipairs(ids) do call('SREM', listeners_key(id), router) end
  end

  -- Counts bytes that are kept of a job among its tenant's.
  local function count(job, bytes)
    add('budget', 't:' .. job.tenant .. ':kept', bytes)
    call('HINCRBY', P .. 'job:' .. job.id, 'kept', int(bytes))
  end

  -- Frees a job's idempotency key, unless that leads elsewhere now.
  local function free_key(id, idem)
    local key = P .. 'idem:' .. (idem or '')
    local holder = (idem or '') ~= '' and call('GET', key)
    if holder and string.sub(holder, 1, string.len(id) + 1) == id .. ' ' then call('DEL', key) end
  end

  -- Where a listed job stands among its tenant's: by when it came, then by id.
  local function list_member(id, at)
    return string.format('%015.0f ', tonumber(at)) .. id
  end

  -- Forgets all that is kept of a job: its output, its bytes, its idempotency key and its place in its tenant's list.
  local function forget(id, tenant, kept, idem, listed, at)
    call('DEL', P .. 'out:' .. id)
    add('budget', 't:' .. tenant .. ':kept', -tonumber(kept or 0))
    free_key(id, idem)
    if listed == '1' and at then call('ZREM', P .. 'listed:' .. tenant, list_member(id, at)) end
  end

  -- Puts a job among its tenant's for as long as it may be kept.
  local function list(job, at, deadline, keep)
    local key = P .. 'listed:' .. job.tenant
    local until_ms = tonumber(deadline) - tonumber(at) + tonumber(keep) + EXPIRY_SLACK_MS
    call('ZADD', key, 0, list_member(job.id, at))
    if call('PTTL', key) < until_ms then call('PEXPIRE', key, int(until_ms)) end
  end

  -- Says that a job has ended to whoever takes notice of ends.
  local function notice(job, state, word)
    local key = P .. 'ended'
    call('XADD', key, '*', 'id', job.id, 'tenant', job.tenant, 'state', state, 'word', word)
    if call('XLEN', key) > MAX_ENDED then
      call('HINCRBY', P .. 'ended_dropped', 'dropped', call('XTRIM', key, 'MAXLEN', int(MAX_ENDED)))
    end
  end

  -- A job ends in ``state``. Answers what its record keeps beside the tombstone; nil if nothing is kept of it. A listed
  -- job is kept however it ends, with what it has said so far; only an answer keeps its idempotency key.
  local function close(job, state)
    local now = now_ms()
    listeners_of(job)
    call('DEL', listeners_key(job.id))
    local found = call('HMGET', P .. 'job:' .. job.id, 'kept', 'idem', 'keep', 'next', 'listed', 'notify', 'job_metadata', 'started', 'begun', 'replaced')
    local kept, idem, keep, next_frame = found[1] or '0', found[2] or '', found[3], found[4] or ''
    local listed, word, job_metadata = found[5] or '', found[6] or '', found[7] or ''
    local is_answer = state == 'done' or state == 'failed'
    if word ~= '' then notice(job, state, word) end
    if not keep or not (is_answer or listed == '1') then
      forget(job.id, job.tenant, kept, idem, listed, job.at)
      return nil
    end
    call('ZADD', P .. 'kept', int(now + tonumber(keep)), job.id)
    call('PEXPIRE', P .. 'out:' .. job.id, int(tonumber(keep) + EXPIRY_SLACK_MS))
    if not is_answer then
      free_key(job.id, idem)
      idem = ''
    elseif idem ~= '' then
      call('PEXPIRE', P .. 'idem:' .. idem, int(tonumber(keep) + EXPIRY_SLACK_MS))
    end
    local fields = { 'stored', '1', 'tenant', job.tenant, 'kept', kept, 'idem', idem, 'next', next_frame }
    if job_metadata ~= '' then
      for i, value in ipairs({ 'pool', job.pool, 'lane', job.lane, 'at', job.at, 'started', found[8] or '', 'deadline',
        job.deadline, 'attempts', job.attempts, 'over', int(now), 'until', int(now + tonumber(keep)), 'cause',
        string.sub(job.why or '', 1, 500), 'listed', listed, 'notify', word, 'begun', found[9] or '',
        'replaced', found[10] or '', 'job_metadata', job_metadata }) do
        fields[#fields + 1] = value
      end
    end
    return fields
  end

  -- What may be told of a stored job: {} if it is unknown, or nothing is kept of it. The order is that of
  -- broker/operations/persisted_jobs.py.
  local function describe(id)
    local found = call('HMGET', P .. 'job:' .. id, 'tenant', 'state', 'epoch', 'attempts', 'pool', 'lane', 'at', 'started',
      'over', 'deadline', 'until', 'cause', 'listed', 'notify', 'kept', 'stored', 'begun', 'replaced', 'job_metadata')
    if not found[1] or found[16] ~= '1' then return {} end
    local told = { id, int(now_ms()) }
    for i = 1, 19 do told[i + 2] = found[i] or '' end
    return told
  end

  stored_tools = { listen = listen, listeners_of = listeners_of, send = send, count = count, forget = forget,
    close = close, list = list, list_member = list_member, describe = describe }
  return stored_tools
end

local function tell(job, kind, epoch, reason)
  local marker = kind .. ' ' .. job.id .. ' ' .. epoch .. ' ' .. reason
  if job.stored == '1' then
    for _, router in ipairs(stored().listeners_of(job)) do stored().send(router, 'm', marker, { job.id }) end
  elseif job.reply ~= '' then
    call('XADD', P .. 'reply:' .. job.reply, 'NOMKSTREAM', '*', 'm', marker)
  end
end

local listening = {}

local function nobody_waits(job)
  if job.reply == '' or job.stored == '1' then return false end
  if listening[job.reply] == nil then listening[job.reply] = call('EXISTS', P .. 'reply:' .. job.reply) == 1 end
  return not listening[job.reply]
end

-- Wakes the worker that parked first at a place; those that are gone are dropped. Answers its session_id.
local function wake_parked(where, now)
  local parked = P .. 'parked:' .. where
  for _ = 1, 64 do
    local popped = call('ZPOPMIN', parked)
    if not popped[1] then return nil end
    if tonumber(popped[2]) >= now and call('XADD', P .. 'ctl:' .. popped[1], 'NOMKSTREAM', '*', 'k', 'wake') then
      return popped[1]
    end
  end
  return nil
end

local regions = nil

-- The regions that jobs or workers have named lately, at most MAX_REGIONS.
local function known_regions()
  regions = regions or call('ZRANGE', P .. 'regions', 0, MAX_REGIONS - 1)
  return regions
end

-- Wakes one worker of no region, or of any but ``except``; not always one of the same region.
local function wake_elsewhere(base, except, now)
  local woken = wake_parked(base, now)
  local others = not woken and known_regions() or {}
  for i = 1, #others do
    local region = others[(i + now) % #others + 1]
    woken = region ~= except and wake_parked(base .. '@' .. region, now) or nil
    if woken then break end
  end
  return woken
end

-- What only calls that meet regions need. It is made on demand: every function that a script defines costs each call.
local region_tools = nil

local function regional()
  if region_tools then return region_tools end

  local named = {}

  -- Keeps a region known until then. Answers false if there are too many: its jobs and workers are then of no region.
  local function name_region(region, until_ms, now)
    if named[region] and named[region] >= until_ms then return true end
    local key = P .. 'regions'
    local kept = tonumber(call('ZSCORE', key, region) or 0)
    if kept < until_ms then
      if kept == 0 then
        call('ZREMRANGEBYSCORE', key, '-inf', int(now))
        if call('ZCARD', key) >= MAX_REGIONS then return false end
      end
      kept = until_ms + REGION_MEMORY_MS
      call('ZADD', key, int(kept), region)
      call('PEXPIRE', key, int(call('ZRANGE', key, -1, -1, 'WITHSCORES')[2] - now + EXPIRY_SLACK_MS))
      regions = nil
    end
    named[region] = kept
    return true
  end

  -- Jobs of a region that wait are watched from remote by one worker with a free slot: it was told when to look whether
  -- they still wait. ``remote:<pool>`` holds, per lane and region, that time and the watcher ('-': nobody had a free
  -- slot; whoever claims next takes over). The time is never behind that at which a job is free for all.
  local watches = {}

  local function watch_of(pool, part)
    local key = P .. 'remote:' .. pool
    watches[key] = watches[key] or {}
    if watches[key][part] == nil then
      local at, watcher = string.match(call('HGET', key, part) or '', '^(%d+) (%S+)$')
      watches[key][part] = at and { at = tonumber(at), watcher = watcher } or false
    end
    return watches[key][part]
  end

  local function set_watch(pool, part, at, watcher)
    local key = P .. 'remote:' .. pool
    call('HSET', key, part, int(at) .. ' ' .. watcher)
    watches[key] = watches[key] or {}
    watches[key][part] = { at = at, watcher = watcher }
  end

  -- Keeps what is known of a pool's watches until then.
  local function keep_watches(pool, until_ms, now)
    local key = P .. 'remote:' .. pool
    if call('PTTL', key) < until_ms - now + EXPIRY_SLACK_MS then
      call('PEXPIRE', key, int(until_ms - now + REGION_MEMORY_MS + EXPIRY_SLACK_MS))
    end
  end

  -- Sees to it that somebody remote looks at a place when a job there is free for all. Answers who was woken for it.
  local function ensure_watch(pool, part, free, now)
    local watch = watch_of(pool, part)
    if watch and watch.at <= free and (now <= watch.at + LATE_MS or watch.watcher == '-') then return nil end
    local lane, region = lane_and_region(part)
    local woken = wake_elsewhere(pool .. ':' .. lane, region, now)
    set_watch(pool, part, watch and math.min(watch.at, free) or free, woken or '-')
    return woken
  end

  region_tools = { name = name_region, watch_of = watch_of, set_watch = set_watch, keep_watches = keep_watches,
    ensure_watch = ensure_watch }
  return region_tools
end

-- Wakes one worker that may claim at a place now: the region's own, or anybody if there is no region.
local function wake_one(where, now)
  if string.find(where, '@', 1, true) then return wake_parked(where, now) end
  return wake_elsewhere(where, nil, now)
end

-- What an entry of a waiting stream, and a lease, say of their job beside its id and epoch: whose budgets it counts for,
-- so that they can be given back should its record be gone.
local function accounts(job)
  return job.tenant .. ' ' .. job.size
end

local function give_back(pool, tenant, size)
  add('budget', 't:' .. tenant .. ':jobs', -1)
  add('budget', 't:' .. tenant .. ':bytes', -tonumber(size))
  add('budget', 'p:' .. pool .. ':jobs', -1)
  add('budget', 'p:' .. pool .. ':bytes', -tonumber(size))
end

-- Takes an entry out of a waiting stream whose job is not to be found by it: its record was evicted or deleted.
local function drop_entry(queue, entry)
  if call('XDEL', P .. queue, entry[1]) == 0 then return end
  local where = string.match(queue, '^q:(.*):%d:[^:]*$') or string.match(queue, '^%a+:(.*)$')
  local tenant, size = string.match(entry[2][4] or '', '^(%S+) (%d+)$')
  add('depth', where .. ':waiting', -1)
  if tenant then give_back(string.match(where, '^[^:]*'), tenant, size) end
  if call('XLEN', P .. queue) == 0 then call('DEL', P .. queue) end
end

-- Takes a lease away whose job is not held by it: its record was evicted or deleted. ``value``: as it stands there.
local function drop_lease(owner, id, value)
  if call('HDEL', P .. 'leases:' .. owner, id) == 0 then return end
  local where, tenant, size = string.match(value or '', '^%S+ (%S+) (%S+) (%d+)$')
  if not where then return end
  add('depth', where .. ':leased', -1)
  give_back(string.match(where, '^[^:]*'), tenant, size)
end

-- Takes a queued job's entry out of its waiting stream.
local function leave_queue(job)
  local queue = P .. job.queue
  call('XDEL', queue, job.entry)
  add('depth', place(job) .. ':waiting', -1)
  if call('XLEN', queue) == 0 then
    call('DEL', queue)
    if string.sub(job.queue, 1, 2) == 'q:' then
      call('ZREM', P .. 'active:' .. place(job) .. ':' .. job.band, job.tenant)
    end
  end
end

local function is_suspect(job)
  return job.suspicion ~= '' and tonumber(job.suspicion) >= SUSPECT
end

-- Whether an attempt, as '<job id> <attempt id>', still runs.
local function still_runs(attempt)
  local id, aid = string.match(attempt, '(%S+) (%S+)')
  local job = load_job(id)
  return job ~= nil and job.state == 'leased' and job.aid == aid
end

local function leave_lease(job)
  local ids = freed_leases[job.owner] or {}
  ids[#ids + 1] = job.id
  freed_leases[job.owner] = ids
  add('depth', place(job) .. ':leased', -1)
  -- Its worker may hold another one now.
  if is_suspect(job) and call('EXISTS', P .. 'suspects:' .. place(job)) == 1 then
    call('XADD', P .. 'ctl:' .. job.owner, 'NOMKSTREAM', '*', 'k', 'wake')
  end
end

-- Makes the record a tombstone (of a stored job with an answer, one that stays as long as that is kept) and returns the
-- job's budget. ``aid`` is the attempt that ended it, '' if none did. ``cause`` is counted beside the state of what was
-- cancelled or expired: 'waiting' or 'running', as it was then, or 'router_gone'.
local function finish(job, state, aid, cause)
  local key = P .. 'job:' .. job.id
  local kept = job.stored == '1' and stored().close(job, state)
  call('DEL', key)
  call('HSET', key, 'state', state, 'epoch', job.epoch, 'aid', aid)
  if kept then
    call('HSET', key, unpack(kept))
  else
    call('PEXPIRE', key, TOMBSTONE_MS)
  end
  freed_deadlines[#freed_deadlines + 1] = job.id
  add('budget', 't:' .. job.tenant .. ':jobs', -1)
  add('budget', 't:' .. job.tenant .. ':bytes', -tonumber(job.size))
  add('budget', 'p:' .. job.pool .. ':jobs', -1)
  add('budget', 'p:' .. job.pool .. ':bytes', -tonumber(job.size))
  total(job, state)
  if cause then total(job, state .. '/' .. cause) end
end

local function trim_dead(now)
  local dead = P .. 'dead'
  for _ = 1, 64 do
    local first = call('XRANGE', dead, '-', '+', 'COUNT', 1)[1]
    if not first then return end
    local died_at = tonumber((string.match(first[1], '^%d+')))
    for i = 1, #first[2], 2 do
      if first[2][i] == 'at' then died_at = tonumber(first[2][i + 1]) end
    end
    local old = died_at < now - DEAD_AGE_MS
    if not old and counter('budget', 'dead:bytes') <= DEAD_BYTES then return end
    call('XDEL', dead, first[1])
    for i = 1, #first[2], 2 do
      if first[2][i] == 'size' then add('budget', 'dead:bytes', -tonumber(first[2][i + 1])) end
    end
  end
end

-- A leased job whose attempts are used up becomes a dead letter.
local function declare_dead(job, reason, now)
  local envelope = call('HGET', P .. 'job:' .. job.id, 'env')
  leave_lease(job)
  call('XADD', P .. 'dead', '*', 'id', job.id, 'cause', reason, 'worker', job.owner, 'attempts', job.attempts,
    'pool', job.pool, 'lane', job.lane, 'tenant', job.tenant, 'size', job.size, 'at', int(now), 'env', envelope)
  add('budget', 'dead:bytes', tonumber(job.size))
  trim_dead(now)
  job.why = reason
  finish(job, 'dead', job.aid)
  tell(job, 'dead', job.epoch, reason)
end

local function cancel_leased(job, state, reason, cause)
  leave_lease(job)
  call('XADD', P .. 'ctl:' .. job.owner, 'NOMKSTREAM', '*', 'k', 'abort', 'job', job.id, 'why', reason)
  job.why = reason
  finish(job, state, '', cause or 'running')
  tell(job, state, job.epoch, reason)
end

-- A job that is not leased ends.
local function cancel_waiting(job, state, reason, cause)
  if job.state == 'lost' then
    call('ZREM', P .. 'lost', job.id)
  else
    leave_queue(job)
    job.lane = lane_and_region(job.lane)
  end
  job.why = reason
  finish(job, state, '', cause or 'waiting')
  tell(job, state, job.epoch, reason)
end

-- Puts a job whose attempt ended unsettled ahead of new work. Answers the fields of its record that say so.
local function wait_again(job)
  local queue = (is_suspect(job) and 'suspects:' or 'retry:') .. place(job)
  add('depth', place(job) .. ':waiting', 1)
  return 'state', 'queued', 'queue', queue, 'entry', call('XADD', P .. queue, '*', 'id', job.id, 'of', accounts(job))
end

-- What becomes of a leased job whose attempt ended unsettled: 'cancelled', 'dead', 'requeued', or 'lost', until its
-- Router says what was delivered. All but the first two begin the next epoch.
local function give_up(job, counted, reason, now)
  if nobody_waits(job) then
    cancel_leased(job, 'cancelled', NOBODY_WAITS, 'router_gone')
    return 'cancelled'
  end
  local attempts = tonumber(job.attempts)
  if not counted then attempts = attempts - 1 end
  if attempts >= tonumber(job.max) then
    declare_dead(job, reason, now)
    return 'dead'
  end
  leave_lease(job)
  local fate = job.resume == '1' and 'lost' or 'requeued'
  local epoch = int(tonumber(job.epoch) + 1)
  local key = P .. 'job:' .. job.id
  call('HSET', key, 'epoch', epoch, 'attempts', int(attempts), 'aid', '', 'owner', '')
  if fate == 'lost' then
    call('HSET', key, 'state', 'lost')
    call('ZADD', P .. 'lost', int(now + LOST_MS), job.id)
  else
    call('HSET', key, wait_again(job))
  end
  total(job, fate)
  tell(job, fate, epoch, reason)
  return fate
end

-- What becomes of leased jobs whose engine, or worker, ended while they ran. Which of them did it cannot be known: if
-- some were under suspicion before, each of those is charged an attempt, else each of all. Suspicion grows by
-- ``weight``; a job that is not charged comes under suspicion at once, and is charged the next time even if it was
-- cleared since: nobody goes free twice.
-- ``suspects``: whether some were under suspicion.
local function give_up_crashed(job, suspects, weight, reason, now)
  local counted = not suspects or is_suspect(job) or job.spared == '1'
  local suspicion = (tonumber(job.suspicion) or 0) + weight
  if not counted then suspicion = math.max(suspicion, SUSPECT) end
  job.suspicion = int(suspicion)
  local fate = give_up(job, counted, reason, now)
  if fate == 'lost' or fate == 'requeued' then
    call('HSET', P .. 'job:' .. job.id, 'suspicion', job.suspicion, 'spared', counted and job.spared or '1')
  end
  return fate
end

-- An attempt that its own worker ended: a repeated call is known by it, and its worker is avoided for a while.
local function note_ended(job, avoid_ms, now)
  call('HSET', P .. 'job:' .. job.id, 'ended', job.epoch .. ':' .. job.aid)
  if avoid_ms > 0 then
    call('HSET', P .. 'job:' .. job.id, 'avoid', job.owner, 'avoid_until', int(now + avoid_ms))
  end
end

-- Whether an session id was declared dead, or never joined. While a reclaim is under way its number is negative: another
-- Manager finds it standing still, and finishes what the first one began.
local function is_fenced(session_id)
  local number = call('HGET', P .. 'beats', session_id)
  return not number or tonumber(number) < 0
end

-- The job if ``epoch`` and ``aid`` own it; else nil and the answer to give: gone, duplicate (this attempt itself ended
-- the job, or, for ``releasing``, handed it back) or fenced.
local function fence(id, epoch, aid, releasing)
  local job = load_job(id)
  if not job then return nil, 'gone' end
  local same = job.epoch == epoch and job.aid == aid
  if same and job.state == 'leased' then return job end
  if same and TERMINAL[job.state] then return nil, 'duplicate' end
  if releasing and job.ended == epoch .. ':' .. aid then return nil, 'duplicate' end
  return nil, 'fenced'
end
