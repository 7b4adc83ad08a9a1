-- Ends all attempts that ran on an engine that crashed: the jobs wait again, ahead of new work, as suspects.
-- ARGV: prefix, reason, then per attempt: job id, epoch, attempt id.
-- Reply: per attempt 'ok', 'duplicate', 'fenced' or 'gone'.
-- Invariants: 1 no lost job, 3 fence, 11 poison bound.

local now = now_ms()
local answers, jobs, suspects = {}, {}, false
for i = 3, #ARGV, 3 do
  local job, refusal = fence(ARGV[i], ARGV[i + 1], ARGV[i + 2], true)
  if job then
    jobs[#jobs + 1] = job
    suspects = suspects or is_suspect(job)
  end
  answers[#answers + 1] = refusal or 'ok'
end
for _, job in ipairs(jobs) do
  local fate = give_up_crashed(job, suspects, SUSPECT, ARGV[2], now)
  if fate == 'lost' or fate == 'requeued' then note_ended(job, RETRY_APART_MS, now) end
  if fate == 'requeued' then wake_one(place(job), now) end
end
return answered(answers)
