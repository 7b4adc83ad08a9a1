-- Ends attempts that produced an answer.
-- ARGV: prefix, then per attempt: job id, epoch, attempt id, outcome (done, failed or expired), packed frames ('' for none).
-- Reply: per attempt 'ok', 'duplicate', 'fenced' or 'gone'. Frames go out only with 'ok', those for one Router in
--       one entry.
-- Invariants: 2 one result, 3 fence, 12 conservation.

local answers, outgoing, order = {}, {}, {}
for i = 2, #ARGV, 5 do
  local job, refusal = fence(ARGV[i], ARGV[i + 1], ARGV[i + 2])
  if job then
    leave_lease(job)
    finish(job, ARGV[i + 3], job.aid, ARGV[i + 3] == 'expired' and 'running' or nil)
    if job.reply ~= '' and ARGV[i + 4] ~= '' then
      if not outgoing[job.reply] then
        outgoing[job.reply] = {}
        order[#order + 1] = job.reply
      end
      table.insert(outgoing[job.reply], ARGV[i + 4])
    end
  end
  answers[#answers + 1] = refusal or 'ok'
end
for _, reply in ipairs(order) do
  call('XADD', P .. 'reply:' .. reply, 'NOMKSTREAM', '*', 'f', table.concat(outgoing[reply]))
end
return answered(answers)
