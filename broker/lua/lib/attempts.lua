-- Decides what happens to a job whose attempt ended without an answer: retry, wait for its Router, or dead letter.
-- uses: endings, parking, dead_letters

local RETRY_APART_MS = 2000
local LOST_MS = 5000 -- how long until a Router is asked again where a lost stream goes on

-- A leased job whose attempts are used up becomes a dead letter.
local function dead_letter(job, reason, now)
  leave_lease(job)
  add_letter(job, reason, call('HGET', P .. 'job:' .. job.id, 'env'), now)
  job.why = reason
  end_job(job, 'dead', job.aid)
  notify(job, 'dead', job.epoch, reason)
end

-- Returns 'cancelled', 'dead', 'requeued', or 'lost', until its Router says what was delivered. The last two begin the
-- next epoch.
local function retry_or_end(job, counted, reason, now)
  if nobody_waits(job) then
    cancel_or_expire(job, 'cancelled', NOBODY_WAITS, 'router_gone')
    return 'cancelled'
  end
  local attempts = tonumber(job.attempts) - (counted and 0 or 1)
  if attempts >= tonumber(job.max) then
    dead_letter(job, reason, now)
    return 'dead'
  end
  leave_lease(job)
  local outcome = job.resume == '1' and 'lost' or 'requeued'
  correct(job, 0)
  job.charged = ''
  job.ended, job.ended_by = job.epoch .. ':' .. job.aid, job.owner
  job.epoch, job.attempts, job.aid, job.owner, job.entry = int(tonumber(job.epoch) + 1), int(attempts), '', '', ''
  if outcome == 'lost' then
    transition(job, 'lost')
    call('ZADD', P .. 'lost', int(now + LOST_MS), job.id)
  else
    requeue(job)
    wake(queue_key(job), now)
  end
  total(job, outcome)
  notify(job, outcome, job.epoch, reason)
  return outcome
end

-- The same for jobs whose engine or worker crashed while they ran. The cause is unknown: with suspects among the jobs
-- (``any_suspect``) each suspect is charged an attempt, else every job. Suspicion grows by ``weight``. A job that is not
-- charged becomes a suspect at once, and is charged the next time even if it was cleared since: each job escapes a charge
-- at most once.
local function end_crashed(job, any_suspect, weight, reason, now)
  local counted = not any_suspect or is_suspect(job) or job.not_charged == '1'
  job.suspicion = int(math.max((tonumber(job.suspicion) or 0) + weight, counted and 0 or SUSPECT))
  local outcome = retry_or_end(job, counted, reason, now)
  if outcome == 'lost' or outcome == 'requeued' then
    local key, not_charged = P .. 'job:' .. job.id, counted and (job.not_charged or '') or '1'
    call('HSET', key, 'suspicion', job.suspicion, 'not_charged', not_charged)
  end
  return outcome
end

-- Notes that a worker ended an attempt itself: a repeated call is known by it, and the worker is avoided for a while.
local function note_handed_back(job, outcome, avoid_ms, now)
  if outcome ~= 'lost' and outcome ~= 'requeued' then return end
  local key = P .. 'job:' .. job.id
  call('HSET', key, 'handed_back', job.ended)
  if avoid_ms > 0 then call('HSET', key, 'avoid', job.ended_by, 'avoid_until', int(now + avoid_ms)) end
end
