-- Ends attempts without an answer: the jobs wait again, ahead of new work.
-- ARGV: prefix, then per attempt: job id, epoch, attempt id, counted (0: handed back as if never started; 1: the attempt is
--       spent and its worker avoided for a while; more: avoided for so many ms; 'crashed': its engine crashed, with all
--       others of this call that say so), reason.
-- Reply: per attempt 'ok', 'duplicate', 'fenced' or 'gone'.
-- Invariants: 1 no lost job, 3 fence, 11 poison bound.
-- uses: attempts, fence

local now = now_ms()
local answers, crashed, any_suspect = {}, {}, false
for i = 2, #ARGV, 5 do
  local job, refusal = fence(ARGV[i], ARGV[i + 1], ARGV[i + 2], true)
  local counted, reason = ARGV[i + 3], ARGV[i + 4]
  if job and counted == 'crashed' then
    job.reason = reason
    crashed[#crashed + 1] = job
    any_suspect = any_suspect or is_suspect(job)
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
