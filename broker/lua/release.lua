-- Ends attempts without an answer: the jobs wait again, ahead of new work.
-- ARGV: prefix, then per attempt: job id, epoch, attempt id, counted (0: handed back as if never started; 1: the attempt is
--       spent and its worker avoided for a while; more: avoided for so many ms; 'crashed': its engine crashed, with all
--       others of this call that say so; 'yielded': it yielded, and is not spent), reason, envelope of the next attempt of
--       one that yielded ('': the same as before).
-- Reply: per attempt 'ok', 'duplicate', 'fenced' or 'gone'.
-- Invariants: 1 no lost job, 3 fence, 11 poison bound.
-- uses: attempts, fence, preemption
-- rarely: yield

local now = now_ms()
local answers, crashed, any_suspect = {}, {}, false

-- A job that may yield goes on behind what it said; another one is handed back as it was.
local function yield(job, envelope, reason)
  local left, size = yields_left(job), string.len(envelope)
  if left > 0 then job.resume = string.gsub(job.resume, '%d+', int(left - 1), 1) end
  if left > 0 and size > 0 then
    spend(job.pool, job.tenant, 0, size - tonumber(job.size))
    job.size = int(size)
  end
  local outcome = retry_or_end(job, false, reason, now)
  note_handed_back(job, outcome, 0, now)
  if left > 0 and outcome == 'requeued' then total(job, 'yielded') end
  if left > 0 and size > 0 and outcome == 'requeued' then call('HSET', P .. 'job:' .. job.id, 'env', envelope) end
end

for i = 2, #ARGV, 6 do
  local job, refusal = fence(ARGV[i], ARGV[i + 1], ARGV[i + 2], true)
  local counted, reason = ARGV[i + 3], ARGV[i + 4]
  if job and counted == 'crashed' then
    job.reason = reason
    crashed[#crashed + 1] = job
    any_suspect = any_suspect or is_suspect(job)
  elseif job and counted == 'yielded' then
    yield(job, ARGV[i + 5], reason)
  elseif job then
    local avoid_ms = tonumber(counted)
    local outcome = retry_or_end(job, avoid_ms > 0, reason, now)
    note_handed_back(job, outcome, avoid_ms == 1 and RETRY_APART_MS or avoid_ms, now)
  end
  answers[#answers + 1] = refusal or 'ok'
end
for _, job in ipairs(crashed) do
  local outcome = end_crashed(job, any_suspect, SUSPECT, job.reason, now)
  note_handed_back(job, outcome, RETRY_APART_MS, now)
end
return write_counters_and_return(answers)
