-- Ends attempts without an answer: the jobs wait again, ahead of new work.
-- ARGV: prefix, then per attempt: job id, epoch, attempt id, counted (0: handed back as if never started; 1: the attempt is
--       spent and its worker avoided for a while; more: avoided for so many ms), reason.
-- Reply: per attempt 'ok', 'duplicate', 'fenced' or 'gone'.
-- Invariants: 1 no lost job, 3 fence, 11 poison bound.

local now = now_ms()
local answers = {}
for i = 2, #ARGV, 5 do
  local job, refusal = fence(ARGV[i], ARGV[i + 1], ARGV[i + 2], true)
  if job then
    local avoid_ms = tonumber(ARGV[i + 3])
    local counted = avoid_ms > 0
    if avoid_ms == 1 then avoid_ms = RETRY_APART_MS end
    local fate = give_up(job, counted, ARGV[i + 4], now)
    if fate == 'lost' or fate == 'requeued' then note_ended(job, avoid_ms, now) end
    if fate == 'requeued' then wake_one(place(job), now) end
  end
  answers[#answers + 1] = refusal or 'ok'
end
return answered(answers)
