-- Gives a worker up to n jobs, or parks it.
-- ARGV: prefix, session id, seq, turn, n, attempt id base, park_ms, region ('' for none), then pairs: pool, lanes
--       (comma separated).
-- Reply: {'fenced'} if the session id was declared dead (or never joined); else {'ok', look_again_ms, job, ...}, each
--       job {id, envelope, epoch, attempt id, attempt, remaining_ms, waited_ms, suspect (1 or 0)}. Fewer than n jobs: the worker is
--       parked, and should claim again in look_again_ms without being woken (-1: no need), because jobs of another
--       region wait that are free for all then. The same (session id, seq) again answers the same leases, as far as
--       they are still held (if some are not, a wake tells the worker to claim again); an older seq nothing. A reply that grows large ends early, and a wake tells the worker to
--       claim again.
-- The order of lanes and bands, and of home and remote, is that of queue_schemas/lanes.py.
-- Invariants: 3 fence (a reclaimed session id gets nothing), 5 order, 6 bounded starvation, 10 no start after expiry,
--       13 liveness (what is left wakes the next worker).

local session_id, seq, turn, wanted = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local attempt_base, park_ms, region = ARGV[6], tonumber(ARGV[7]), ARGV[8]
local LANES = { 'interactive', 'background', 'batch' }
local MAX_SKIPPED = 64
local MAX_BYTES = 8 * 1024 * 1024 -- of envelopes in one reply, past which the worker claims again
local MAX_HEADS = 16 -- tenants of a band that are looked at from remote
local NEXT_LOOK_MS = 3 -- least time from one look remote to the next
local BEHIND_WATCHER_MS = 250 -- how long after the watcher others look, should it have died
local now = now_ms()

if is_fenced(session_id) then return { 'fenced' } end

local answer = { 'ok', -1 }
local claimed_key = P .. 'claimed:' .. session_id
local last = call('HMGET', claimed_key, 'seq', 'jobs', 'parked', 'look', 'suspect')

local function give(job)
  answer[#answer + 1] = { job.id, job.env, tonumber(job.epoch), job.aid, tonumber(job.attempts),
    math.max(tonumber(job.deadline) - now, 0), math.max(now - tonumber(job.at), 0), is_suspect(job) and 1 or 0 }
end

-- A late copy of an older claim, from a connection that was given up: its jobs would be leased to nobody.
if last[1] and tonumber(seq) < tonumber(last[1]) then return answer end
if last[1] == seq then
  local over = false
  for id, aid in string.gmatch(last[2], '(%S+) (%S+)') do
    local job = load_job(id)
    if job and job.state == 'leased' and job.aid == aid then
      job.env = call('HGET', P .. 'job:' .. id, 'env')
      give(job)
    else
      over = true
    end
  end
  -- With less than it asked for it takes itself for parked, and may not be.
  if over then call('XADD', P .. 'ctl:' .. session_id, 'NOMKSTREAM', '*', 'k', 'wake') end
  if last[4] then answer[2] = math.max(tonumber(last[4]) - now, 1) end
  return answer
end

-- ``serves``: the places at which any worker may claim; ``own``: those of its region, by them.
local pools, serves, own, waiting, places, asked = {}, {}, {}, {}, {}, {}
for i = 9, #ARGV, 2 do
  pools[#pools + 1] = ARGV[i]
  for lane in string.gmatch(ARGV[i + 1], '[^,]+') do
    local where = ARGV[i] .. ':' .. lane
    serves[#serves + 1] = where
    places[#places + 1] = where
    if region ~= '' then
      own[where] = where .. '@' .. region
      places[#places + 1] = own[where]
    end
  end
end
for i, where in ipairs(places) do asked[i] = where .. ':waiting' end
for from = 1, #asked, 1000 do
  local depths = call('HMGET', P .. 'depth', unpack(asked, from, math.min(from + 999, #asked)))
  for i, depth in ipairs(depths) do waiting[places[from + i - 1]] = tonumber(depth or 0) end
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
local function runnable(queue, entry)
  local job = load_job(entry[2][2])
  if not job or job.state ~= 'queued' or job.entry ~= entry[1] then
    drop_entry(queue, entry)
    skipped = skipped + 1
    return nil
  end
  local where = place(job)
  if tonumber(job.deadline) <= now then
    cancel_waiting(job, 'expired', 'its time ran out in the queue')
  elseif nobody_waits(job) then
    cancel_waiting(job, 'cancelled', NOBODY_WAITS, 'router_gone')
  else
    return job
  end
  if waiting[where] then waiting[where] = waiting[where] - 1 end
  skipped = skipped + 1
  return nil
end

local nothing_in = {}

local function take_from_stream(queue)
  if nothing_in[queue] then return nil end
  local from = '-'
  for _ = 1, MAX_SKIPPED / 16 do
    local entries = call('XRANGE', P .. queue, from, '+', 'COUNT', 16)
    for _, entry in ipairs(entries) do
      local job = runnable(queue, entry)
      if job and (job.avoid ~= session_id or tonumber(job.avoid_until) <= now) then return job end
    end
    if #entries < 16 then break end
    from = '(' .. entries[16][1]
  end
  nothing_in[queue] = true
  return nil
end

local held_suspect = last[5] and still_runs(last[5])

-- A job whose attempt was lost or handed back: a suspect, if this worker has none, or one of the others.
local function take_retry(where)
  local job = not held_suspect and take_from_stream('suspects:' .. where)
  return job or take_from_stream('retry:' .. where)
end

-- One unit of service for a tenant. A tenant that waits alone is not charged: it takes nothing from anybody, and those
-- who come start level with it. The band's clock is at the least-served tenant, which is another one if that one's job
-- was not free for all.
local function charge(where, tenant, start, clock)
  local service = P .. 'service:' .. where
  call('ZADD', P .. 'active:' .. where, 'XX', int(start + 1), tenant)
  call('ZREMRANGEBYSCORE', service, '-inf', '(' .. int(clock))
  call('ZADD', service, int(clock), '*', int(start + 1), tenant)
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
        local job = runnable(queue, entry)
        if job then
          if head[3] then charge(where .. ':' .. band, tenant, tonumber(head[2]), tonumber(head[2])) end
          return job
        end
      end
    end
  end
  return nil
end

-- How many jobs were claimed at a place; that of a region's is forgotten after an hour, for regions come and go.
local turns, regional_turns = {}, {}

local function turn_of(where, key)
  turns[where] = turns[where] or tonumber(call('HGET', P .. key, where) or 0)
  return turns[where]
end

local function take(where)
  local t = turn_of(where, 'turns')
  local retry_first = t % 4 ~= 3
  local job = retry_first and take_retry(where) or take_fresh(where, t)
  if not job and not retry_first then job = take_retry(where) end
  if job then
    turns[where] = t + 1
    add('turns', where, 1)
  end
  return job
end

-- A job at home: of this worker's region or of none, in turns.
local function take_home(where, t)
  local theirs = own[where]
  local region_first = theirs and (t + math.floor(t / 16)) % 2 == 0
  local job = nil
  for step = 1, theirs and 2 or 1 do
    if job or skipped >= MAX_SKIPPED then break end
    if theirs and (step == 1) == region_first then
      if waiting[theirs] > 0 then job = take_fresh(theirs, turn_of(theirs, 'regional_turns')) end
      if job then
        turns[theirs] = turns[theirs] + 1
        regional_turns[theirs] = turns[theirs]
      end
    elseif waiting[where] > 0 then
      job = take(where)
    end
  end
  return job
end

-- What a claim has to do with other regions: ``take`` a job there, say when to ``look`` again, ``hand_over`` the watch.
local function other_regions()
  -- Where their jobs wait, by the place without region: what is known of each, longest free for all first.
  local remote, watched = {}, {}
  for _, pool in ipairs(pools) do
    local found = call('HGETALL', P .. 'remote:' .. pool)
    for i = 1, #found, 2 do
      local lane, theirs = lane_and_region(found[i])
      local base = pool .. ':' .. lane
      local at, watcher = string.match(found[i + 1], '^(%d+) (%S+)$')
      if at and theirs and theirs ~= region and waiting[base] then
        local place_abroad = { pool = pool, part = found[i], where = base .. '@' .. theirs, at = tonumber(at),
          watcher = watcher }
        remote[base] = remote[base] or {}
        table.insert(remote[base], place_abroad)
        watched[#watched + 1] = place_abroad
      end
    end
  end
  for _, those in pairs(remote) do
    table.sort(those, function(a, b) return a.at < b.at end)
  end

  -- The first job of a tenant at a place remote, if it is free for all by now; else when it will be, nil if none waits.
  local function free_head(queue, active, tenant)
    while skipped < MAX_SKIPPED do
      local entry = call('XRANGE', P .. queue, '-', '+', 'COUNT', 1)[1]
      if not entry then
        call('ZREM', active, tenant)
        return nil, nil
      end
      local free = tonumber(call('HGET', P .. 'job:' .. entry[2][2], 'free') or 0)
      if free > now then return nil, free end
      local job = runnable(queue, entry)
      if job then return job, nil end
    end
    return nil, now
  end

  -- A job remote that is free for all, of the tenant that was served least among those who have one. If there is none,
  -- ``next_free`` of the place is when there may be one; nil if nothing waits there.
  local function take_free(place_abroad, t)
    place_abroad.next_free = nil
    for _, band in ipairs(band_order(t)) do
      local where = place_abroad.where .. ':' .. band
      local active = P .. 'active:' .. where
      local heads = call('ZRANGE', active, 0, MAX_HEADS - 1, 'WITHSCORES')
      for i = 1, #heads, 2 do
        local job, free = free_head('q:' .. where .. ':' .. heads[i], active, heads[i])
        if job then
          if heads[3] then charge(where, heads[i], tonumber(heads[i + 1]), tonumber(heads[2])) end
          return job
        end
        if free then place_abroad.next_free = math.min(place_abroad.next_free or free, free) end
      end
    end
    place_abroad.none_free = true
    return nil
  end

  local function take(where)
    for _, place_abroad in ipairs(remote[where] or {}) do
      if place_abroad.at <= now and not place_abroad.none_free and skipped < MAX_SKIPPED then
        local job = take_free(place_abroad, turn_of(place_abroad.where, 'regional_turns'))
        if job then
          turns[place_abroad.where] = turns[place_abroad.where] + 1
          regional_turns[place_abroad.where] = turns[place_abroad.where]
          return job
        end
      end
    end
    return nil
  end

  -- When this worker, parked, is to look remote again: when a job is free for all if it is the one that watches, a
  -- little later if another does. Who looked last watches.
  local function look()
    local soonest = nil
    for _, watch in ipairs(watched) do
      local at = nil
      if watch.none_free and not watch.next_free then
        call('HDEL', P .. 'remote:' .. watch.pool, watch.part)
      elseif watch.none_free then
        at = math.max(watch.next_free, now + NEXT_LOOK_MS)
        regional().set_watch(watch.pool, watch.part, at, session_id)
      elseif watch.watcher == session_id then
        at = watch.at
      elseif watch.watcher == '-' then
        at = watch.at
        regional().set_watch(watch.pool, watch.part, at, session_id)
      else
        at = watch.at + BEHIND_WATCHER_MS
      end
      if at then soonest = math.min(soonest or at, at) end
    end
    return soonest
  end

  -- This worker has no free slot to watch with: somebody else has to.
  local function hand_over()
    for _, watch in ipairs(watched) do
      if watch.watcher == session_id or watch.at <= now then
        local lane, theirs = lane_and_region(watch.part)
        if counter('depth', watch.where .. ':waiting') == 0 then
          call('HDEL', P .. 'remote:' .. watch.pool, watch.part)
        else
          local woken = wake_elsewhere(watch.pool .. ':' .. lane, theirs, now)
          regional().set_watch(watch.pool, watch.part, watch.at, woken or '-')
        end
      end
    end
  end

  return { known = #watched > 0, take = take, look = look, hand_over = hand_over }
end

-- None are known where none are named, which costs a claim one look.
local remote = #pools > 0 and #known_regions() > 0 and other_regions()
if remote and not remote.known then remote = nil end

local function take_from(lane, t, take_at)
  for p = 0, #pools - 1 do
    local where = pools[(t + p) % #pools + 1] .. ':' .. lane
    if waiting[where] and skipped < MAX_SKIPPED then
      local job = take_at(where, t)
      if job then return job end
    end
  end
  return nil
end

local function next_job(t)
  local far_first = remote and (t + math.floor(t / 16)) % 4 == 3
  for _, lane in ipairs(lane_order(t)) do
    local job = far_first and take_from(lane, t, remote.take) or take_from(lane, t, take_home)
    if not job and remote and not far_first then job = take_from(lane, t, remote.take) end
    if job then return job end
  end
  return nil
end

local held, given_bytes = {}, 0
while #held < wanted and #pools > 0 and given_bytes < MAX_BYTES do
  local job = next_job(turn + #held)
  if not job then break end
  local where = place(job)
  leave_queue(job)
  if waiting[where] then waiting[where] = waiting[where] - 1 end
  job.attempts = int(tonumber(job.attempts) + 1)
  job.aid = attempt_base .. int(#held)
  call('HSET', P .. 'job:' .. job.id, 'state', 'leased', 'aid', job.aid, 'attempts', job.attempts, 'owner', session_id)
  if job.stored == '1' then call('HSETNX', P .. 'job:' .. job.id, 'started', int(now)) end
  if string.find(job.lane, '@', 1, true) then
    job.lane = lane_and_region(job.lane)
    call('HSET', P .. 'job:' .. job.id, 'lane', job.lane)
  end
  call('HSET', P .. 'leases:' .. session_id, job.id, job.epoch .. ' ' .. place(job) .. ' ' .. accounts(job))
  add('depth', place(job) .. ':leased', 1)
  held[#held + 1] = job.id .. ' ' .. job.aid
  if is_suspect(job) then
    held_suspect = held[#held]
    call('HSET', claimed_key, 'suspect', held_suspect)
  end
  given_bytes = given_bytes + tonumber(job.size)
  job.env = call('HGET', P .. 'job:' .. job.id, 'env')
  give(job)
end
if next(regional_turns) then
  local fields = {}
  for where, count in pairs(regional_turns) do
    fields[#fields + 1] = where
    fields[#fields + 1] = int(count)
  end
  call('HSET', P .. 'regional_turns', unpack(fields))
  call('PEXPIRE', P .. 'regional_turns', REGION_MEMORY_MS)
end

local function leave_parking()
  if not last[3] then return end
  for where in string.gmatch(last[3], '%S+') do call('ZREM', P .. 'parked:' .. where, session_id) end
  call('HDEL', claimed_key, 'parked')
end

local look = nil
if #held < wanted and (skipped >= MAX_SKIPPED or given_bytes >= MAX_BYTES) then
  call('XADD', P .. 'ctl:' .. session_id, 'NOMKSTREAM', '*', 'k', 'wake')
elseif #held < wanted then
  local at = serves
  if region ~= '' and regional().name(region, now + park_ms, now) then
    at = {}
    for i, where in ipairs(serves) do at[i] = own[where] end
  end
  local all = table.concat(at, ' ')
  if last[3] ~= all then
    leave_parking()
    call('HSET', claimed_key, 'parked', all)
  end
  for _, where in ipairs(at) do
    call('ZADD', P .. 'parked:' .. where, int(now + park_ms), session_id)
  end
  look = remote and remote.look()
else
  leave_parking()
  if remote then remote.hand_over() end
  for _, where in ipairs(places) do
    if waiting[where] > 0 and wake_one(where, now) then break end
  end
end
call('HSET', claimed_key, 'seq', seq, 'jobs', table.concat(held, ' '))
if look then
  answer[2] = math.max(look - now, 1)
  call('HSET', claimed_key, 'look', int(look))
elseif last[4] then
  call('HDEL', claimed_key, 'look')
end
return answered(answer)
