-- The sweep of each second: ends jobs whose time ran out, asks again after lost streams, forgets answers that were kept
-- long enough, trims dead letters, wakes one worker wherever work and parked workers coexist (a wake may have been lost
-- with its worker), and one remote where nobody watches.
-- ARGV: prefix, limit (jobs in this call), how late it is at least, as the caller measured it (ms; 0: unknown).
-- Reply: {expired, woken, forgotten, the queue's time, the server's time}.
-- Invariants: 10 deadline and cancel, 8 bounded memory, 13 liveness.

local least = tonumber(ARGV[3] or 0)
local now = now_ms(least > 0 and least or nil)
local expired, woken, forgotten = 0, 0, 0
for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'deadlines', '-inf', int(now), 'LIMIT', 0, ARGV[2])) do
  local job = load_job(id)
  if job and (job.state == 'queued' or job.state == 'lost') then
    cancel_waiting(job, 'expired', 'its time ran out in the queue')
    expired = expired + 1
  elseif job and job.state == 'leased' then
    cancel_leased(job, 'expired', 'its time ran out while it ran')
    expired = expired + 1
  else
    call('ZREM', P .. 'deadlines', id)
  end
end

-- Streams whose Router has not said where they go on: it is asked again, unless it is gone.
for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'lost', '-inf', int(now), 'LIMIT', 0, ARGV[2])) do
  local job = load_job(id)
  if not job or job.state ~= 'lost' then
    call('ZREM', P .. 'lost', id)
  elseif nobody_waits(job) then
    cancel_waiting(job, 'cancelled', NOBODY_WAITS, 'router_gone')
  else
    call('ZADD', P .. 'lost', int(now + LOST_MS), id)
    tell(job, 'lost', job.epoch, 'its router has not said where it goes on')
  end
end

for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'kept', '-inf', int(now), 'LIMIT', 0, ARGV[2])) do
  local found = call('HMGET', P .. 'job:' .. id, 'tenant', 'kept', 'idem', 'listed', 'at')
  call('ZREM', P .. 'kept', id)
  call('DEL', P .. 'job:' .. id)
  if found[1] then stored().forget(id, unpack(found)) end
  forgotten = forgotten + 1
end

-- A region's jobs without a watcher, or with one that did not look when it should have.
local function see_watched(pool, part, now)
  local watch = regional().watch_of(pool, part)
  if watch and now <= watch.at + LATE_MS then return nil end
  local lane, region = lane_and_region(part)
  local woken = wake_elsewhere(pool .. ':' .. lane, region, now)
  if woken or not watch then
    regional().set_watch(pool, part, watch and watch.at or now, woken or '-')
    regional().keep_watches(pool, now, now)
  end
  return woken
end

-- The streams of Routers and durable replies that nobody kept alive.
for _, router in ipairs(call('ZRANGEBYSCORE', P .. 'readers', '-inf', int(now), 'LIMIT', 0, 64)) do
  call('DEL', P .. 'reply:' .. router)
  call('ZREM', P .. 'readers', router)
end

trim_dead(now)
local depth = call('HGETALL', P .. 'depth')
for i = 1, #depth, 2 do
  local where = string.match(depth[i], '^(.*):waiting$')
  -- Without what ended just now.
  if where and tonumber(depth[i + 1]) + (changes.depth[depth[i]] or 0) > 0 then
    if wake_one(where, now) then woken = woken + 1 end
    local pool, part = string.match(where, '^(.*):(%a+@.+)$')
    if pool and see_watched(pool, part, now) then woken = woken + 1 end
  end
end
return answered({ expired, woken, forgotten, now, server_ms() })
