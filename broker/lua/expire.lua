-- The sweep of each second: ends jobs whose time ran out, asks again after lost streams, forgets output that was kept long
-- enough, trims dead letters, and wakes a worker wherever work and parked workers coexist: a wake may have been lost with
-- its worker, and another region's workers are told here that they may run what waits.
-- ARGV: prefix, limit (jobs in this call), how late it is at least, as the caller measured it (ms; 0: unknown).
-- Reply: {expired, woken, forgotten, the queue's time, the server's time}.
-- Invariants: 10 deadline and cancel, 8 bounded memory, 13 liveness.
-- uses: attempts, parking

local limit, at_least = ARGV[2], tonumber(ARGV[3])
local now = now_ms(at_least > 0 and at_least or nil)
local expired, woken, forgotten = 0, 0, 0

local function due(key)
  return call('ZRANGEBYSCORE', P .. key, '-inf', int(now), 'LIMIT', 0, limit)
end

for _, id in ipairs(due('deadlines')) do
  local job = load_job(id)
  if not job or not TRANSITIONS[job.state .. ' expired'] then
    call('ZREM', P .. 'deadlines', id)
  else
    cancel_or_expire(job, 'expired', job.state == 'leased' and EXPIRED_RUNNING or EXPIRED_WAITING)
    expired = expired + 1
  end
end
for _, id in ipairs(due('lost')) do
  local job = load_job(id)
  if not job or job.state ~= 'lost' then
    call('ZREM', P .. 'lost', id)
  elseif nobody_waits(job) then
    cancel_or_expire(job, 'cancelled', NOBODY_WAITS, 'router_gone')
  else
    call('ZADD', P .. 'lost', int(now + LOST_MS), id)
    notify(job, 'lost', job.epoch, 'its router has not said where it goes on')
  end
end
for _, id in ipairs(due('persisted')) do
  local found = call('HMGET', P .. 'job:' .. id, 'tenant', 'persisted_bytes', 'idem', 'listed', 'at')
  call('ZREM', P .. 'persisted', id)
  call('DEL', P .. 'job:' .. id)
  if found[1] then delete_persisted(id, unpack(found)) end
  forgotten = forgotten + 1
end
for _, reader in ipairs(due('readers')) do
  call('DEL', P .. 'reply:' .. reader)
  call('ZREM', P .. 'readers', reader)
end
trim_dead(now)

local counters = call('HGETALL', P .. 'counters')
for i = 1, #counters, 2 do
  local key = string.match(counters[i], '^(.*):waiting$')
  if key and tonumber(counters[i + 1]) + (changes.counters[counters[i]] or 0) > 0 then -- without what ended just now
    if wake(key, now) then woken = woken + 1 end
    local shared = without_region(key)
    local eligible_at = shared ~= key and tonumber(call('ZSCORE', P .. 'remote', key) or now)
    if eligible_at == now then call('ZADD', P .. 'remote', int(now), key) end
    if eligible_at and eligible_at <= now and wake(shared, now) then woken = woken + 1 end
  end
end
return write_counters_and_return({ expired, woken, forgotten, now, server_ms() })
