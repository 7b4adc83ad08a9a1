-- The sweep of each second: ends jobs whose time ran out, trims dead letters, wakes one worker wherever work and
-- parked workers coexist (a wake may have been lost with its worker).
-- ARGV: prefix, limit (jobs in this call).
-- Reply: {expired, woken}.
-- Invariants: 10 deadline and cancel, 8 bounded memory, 13 liveness.

local now = now_ms()
local expired, woken = 0, 0
for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'deadlines', '-inf', int(now), 'LIMIT', 0, ARGV[2])) do
  local job = load_job(id)
  if job and job.state == 'queued' then
    cancel_queued(job, 'expired', 'its time ran out in the queue')
    expired = expired + 1
  elseif job and job.state == 'leased' then
    cancel_leased(job, 'expired', 'its time ran out while it ran')
    expired = expired + 1
  else
    call('ZREM', P .. 'deadlines', id)
  end
end
trim_dead(now)
local depth = call('HGETALL', P .. 'depth')
for i = 1, #depth, 2 do
  local where = string.match(depth[i], '^(.*):waiting$')
  if where and wake_one(where, now) then woken = woken + 1 end
end
return answered({ expired, woken })
