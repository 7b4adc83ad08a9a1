-- Makes the same what a worker runs and what the server says that it runs: after a restart or a failover the server may
-- have lost its latest writes. What it leases to a worker that does not run it waits again, uncounted, under an epoch above all
-- that the lost writes may have given out: nothing from then is taken for something from now. Jobs
-- handed to it that it has not read of yet are on their way.
-- ARGV: prefix, session id, seq of its last claim, id of the last control message read, then per attempt that it runs: job
--       id, epoch, attempt id.
-- Reply: {'fenced'} if the session was declared dead (or never joined); else {'ok', attempt id, ...}: those that it runs
--       and does not hold. A late copy of an older call changes nothing: its worker has claimed since.
-- Invariants: 1 no lost job, 2 one result, 3 fence, 12 conservation.
-- uses: attempts, epochs, fence

local now = now_ms()
local session_id, seq, last_read = ARGV[2], tonumber(ARGV[3]), ARGV[4]
if is_fenced(session_id) then return { 'fenced' } end
local answer, runs = { 'ok' }, {}
for i = 5, #ARGV, 3 do
  local job = fence(ARGV[i], ARGV[i + 1], ARGV[i + 2])
  if job then runs[job.id] = true else answer[#answer + 1] = ARGV[i + 2] end
end
if tonumber(call('HGET', P .. 'claimed:' .. session_id, 'seq') or 0) > seq then return answer end
local leases, control = P .. 'leases:' .. session_id, P .. 'ctl:' .. session_id

-- Whether a job was handed over by a control message that the worker has not read yet.
local function is_unread(entry)
  local found = entry ~= '' and call('XREVRANGE', control, entry, '(' .. last_read, 'COUNT', 1)[1]
  return found and found[1] == entry
end

for _, id in ipairs(call('HKEYS', leases)) do
  local job = not runs[id] and load_job(id)
  if job and job.state == 'leased' and is_unread(job.entry) then
    runs[id] = true
  elseif job and job.state == 'leased' and job.owner == session_id then
    job.epoch = int(next_run(job.epoch) - 1)
    retry_or_end(job, false, 'the queue lost what its worker wrote', now)
  elseif not runs[id] then
    call('HDEL', leases, id) -- its record was evicted or deleted
  end
end
-- New messages must stand behind the last one read, which may have been lost, on whatever clock. Refused if ids were given
-- out beyond it: they do so then.
if call('EXISTS', control) == 1 and not call('XRANGE', control, last_read, '+', 'COUNT', 1)[1] then
  redis.pcall('XADD', control, last_read, 'k', 'hello')
end
return write_counters_and_return(answer)
