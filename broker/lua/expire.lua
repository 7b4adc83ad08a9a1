-- The sweep of each second: ends jobs whose time ran out, asks again after lost streams, forgets output that was kept long
-- enough, trims dead letters, has attempts yield where interactive jobs still wait, opens what waited for a region's workers
-- to all, wakes a worker wherever work and parked workers coexist (a wake may have been lost with its worker), and notes how
-- many jobs came to each lane of late.
-- ARGV: prefix, limit (jobs in this call), how late it is at least, as the caller measured it (ms; 0: unknown).
-- Reply: {expired, woken, forgotten, most jobs of a queue key opened, the queue's time, the server's time, queue keys at which
--       something waits}.
-- Invariants: 10 deadline and cancel, 8 bounded memory, 13 liveness.
-- uses: attempts, parking, preemption, arrivals_rules
-- rarely: ask_to_yield

local MAX_TENANTS = 256 -- of a band, whose jobs of a region one sweep opens to all
local MAX_ASKED = 64 -- attempts that one sweep has yield to what waits at a queue key
local limit, at_least = ARGV[2], tonumber(ARGV[3])
local now = now_ms(at_least > 0 and at_least or nil)
local expired, woken, forgotten, opened = 0, 0, 0, 0

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
  local job = load_job(id)
  call('ZREM', P .. 'persisted', id)
  if job and job.persisted == '1' then
    delete_persisted(job, unpack(call('HMGET', P .. 'job:' .. id, 'persisted_bytes', 'idem', 'listed')))
    call('DEL', P .. 'job:' .. id)
  end
  forgotten = forgotten + 1
end
for _, reader in ipairs(due('readers')) do
  call('DEL', P .. 'reply:' .. reader)
  call('ZREM', P .. 'readers', reader)
end
trim_dead(now)

-- Moves jobs of a region to where workers of all may run them, once they have waited for that one's. Answers how many.
local function open_to_all(key)
  local moved = 0
  for _, queue in ipairs((streams_at(key, MAX_TENANTS))) do
    for _, entry in ipairs(call('XRANGE', P .. queue, '-', '+', 'COUNT', limit)) do
      local job = job_of_entry(queue, entry)
      local fields = job and call('HMGET', P .. 'job:' .. job.id, 'eligible_at', 'digests')
      local eligible_at = tonumber(fields and fields[1] or 0)
      if job and (eligible_at > now or moved >= tonumber(limit)) then break end
      if job then
        leave_queue(job)
        job.lane, moved = without_region(job.lane), moved + 1
        add_new_entry(job, fields[2] or '')
        save(job)
      end
    end
  end
  return moved
end

-- Notes how many jobs have come to each lane so far, and what is left of those, in thousandths, once older ones have faded.
-- ``scheduling/arrivals.py`` says the same, and why.
local function look_at_arrivals(counters)
  local found, before = call('HGETALL', P .. 'arrivals'), {}
  for i = 1, #found, 2 do before[found[i]] = found[i + 1] end
  local passed = now - tonumber(before.at or 0)
  if passed >= 0 and passed < LOOK_MS then return end
  for i = 1, #counters, 2 do
    local lane = string.sub(counters[i], -9) == ':enqueued' and string.sub(counters[i], 1, -10)
    if lane then
      local total, left = string.match(before[lane] or '', '^(%d+) (%d+)$')
      local came = math.max(tonumber(counters[i + 1]) - tonumber(total or 0), 0)
      left = math.floor((tonumber(left or 0) + came * 1000) * (WINDOW_MS / (WINDOW_MS + math.max(passed, 0))))
      local after = counters[i + 1] .. ' ' .. int(left)
      if after ~= before[lane] then gather('HSET', P .. 'arrivals', lane, after) end
    end
  end
  gather('HSET', P .. 'arrivals', 'at', int(now))
end

local counters, waiting_keys = call('HGETALL', P .. 'counters'), {}
look_at_arrivals(counters)
for i = 1, #counters, 2 do
  local key = string.sub(counters[i], -8) == ':waiting' and string.sub(counters[i], 1, -9)
  if key then known.counters[counters[i]] = tonumber(counters[i + 1]) end
  if key and waiting(key) > 0 then -- without what ended just now
    waiting_keys[#waiting_keys + 1] = key
    local shared = without_region(key)
    local moved = shared ~= key and open_to_all(key) or 0
    opened = math.max(opened, moved)
    for _, at in ipairs(moved > 0 and { shared, key } or { key }) do
      local left = MAX_ASKED
      if waiting(at) > 0 and wake(at, now) then
        woken = woken + 1
      else
        while left > 0 and ask_to_yield(at, now) do left = left - 1 end
      end
    end
  end
end
return write_counters_and_return({ expired, woken, forgotten, opened, now, server_ms(), waiting_keys })
