-- What becomes of a job whose attempt ended without an answer.
-- uses: endings, parking, dead_letters

local RETRY_APART_MS = 2000
local LOST_MS = 5000 -- how long until a Router is asked again where a lost stream goes on

-- A leased job whose attempts are used up becomes a dead letter.
local function declare_dead(job, reason, now)
  leave_lease(job)
  add_letter(job, reason, call('HGET', P .. 'job:' .. job.id, 'env'), now)
  job.why = reason
  end_job(job, 'dead', job.aid)
  notify(job, 'dead', job.epoch, reason)
end

-- Answers 'cancelled', 'dead', 'requeued', or 'lost', until its Router says what was delivered. The last two begin the
-- next epoch.
local function end_attempt(job, counted, reason, now)
  if nobody_waits(job) then
    stop(job, 'cancelled', NOBODY_WAITS, 'router_gone')
    return 'cancelled'
  end
  local attempts = tonumber(job.attempts) - (counted and 0 or 1)
  if attempts >= tonumber(job.max) then
    declare_dead(job, reason, now)
    return 'dead'
  end
  leave_lease(job)
  local fate = job.resume == '1' and 'lost' or 'requeued'
  local epoch = int(tonumber(job.epoch) + 1)
  local fields = { 'epoch', epoch, 'attempts', int(attempts), 'aid', '', 'owner', '' }
  if fate == 'lost' then
    transition(job, 'lost', unpack(fields))
    call('ZADD', P .. 'lost', int(now + LOST_MS), job.id)
  else
    requeue(job, unpack(fields))
    wake(queue_key(job), now)
  end
  total(job, fate)
  notify(job, fate, epoch, reason)
  return fate
end

-- The same for jobs whose engine, or worker, ended while they ran. Which of them did it cannot be known: if some were under
-- suspicion (``suspects``), each of those is charged an attempt, else each of all. Suspicion grows by ``weight``; a job that
-- is not charged is a suspect at once, and is charged the next time even if it was cleared since: nobody goes free twice.
local function end_crashed(job, suspects, weight, reason, now)
  local counted = not suspects or is_suspect(job) or job.spared == '1'
  job.suspicion = int(math.max((tonumber(job.suspicion) or 0) + weight, counted and 0 or SUSPECT))
  local fate = end_attempt(job, counted, reason, now)
  if fate == 'lost' or fate == 'requeued' then
    call('HSET', P .. 'job:' .. job.id, 'suspicion', job.suspicion, 'spared', counted and job.spared or '1')
  end
  return fate
end

-- Notes that a worker ended an attempt itself: a repeated call is known by it, and the worker is avoided for a while.
local function note_handed_back(job, fate, avoid_ms, now)
  if fate ~= 'lost' and fate ~= 'requeued' then return end
  local key = P .. 'job:' .. job.id
  call('HSET', key, 'handed_back', job.epoch .. ':' .. job.aid)
  if avoid_ms > 0 then call('HSET', key, 'avoid', job.owner, 'avoid_until', int(now + avoid_ms)) end
end
