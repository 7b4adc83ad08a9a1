-- Ends attempts that produced an answer, of jobs whose output is not persisted (those are ended by append).
-- ARGV: prefix, then per attempt: job id, epoch, attempt id, outcome (done, failed or expired), packed frames ('' for none).
-- Reply: per attempt 'ok', 'duplicate', 'fenced' (also one of a persisted job) or 'gone'. Frames go out only with 'ok', those for one Router in one entry.
-- Invariants: 2 one result, 3 fence, 12 conservation.
-- uses: fence, finish, leases

local answers, outgoing, order = {}, {}, {}
for i = 2, #ARGV, 5 do
  local job, refusal = fence(ARGV[i], ARGV[i + 1], ARGV[i + 2])
  local outcome, frames = ARGV[i + 3], ARGV[i + 4]
  if job and job.persisted == '1' then
    refusal = 'fenced' -- an error would leave what was settled before it half written
  elseif job then
    leave_lease(job)
    write_tombstone(job, outcome, job.aid, outcome == 'expired' and 'running' or nil)
    if job.reply ~= '' and frames ~= '' then
      if not outgoing[job.reply] then
        outgoing[job.reply] = {}
        order[#order + 1] = job.reply
      end
      table.insert(outgoing[job.reply], frames)
    end
  end
  answers[#answers + 1] = refusal or 'ok'
end
for _, reply in ipairs(order) do
  call('XADD', P .. 'reply:' .. reply, 'NOMKSTREAM', '*', 'f', table.concat(outgoing[reply]))
end
return write_counters_and_return(answers)
