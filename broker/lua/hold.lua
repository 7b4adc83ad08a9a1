-- What a worker runs, and what the server says that it runs, are made the same: after a restart or a failover the server
-- may have lost its latest writes. What it leases to the worker that does not run it waits again, uncounted, under an
-- epoch above all that the lost writes may have given out: nothing from then is taken for something from now.
-- ARGV: prefix, session id, seq of its last claim, id of the last control message read, then per attempt that it runs:
--       job id, epoch, attempt id.
-- Reply: {'fenced'} if the session id was declared dead (or never joined); else {'ok', attempt id, ...}: those that it
--       runs and does not hold. A late copy of an older call changes nothing: its worker has claimed since.
-- Invariants: 1 no lost job, 2 one result, 3 fence, 12 conservation.

local now = now_ms()
local session_id, last_read = ARGV[2], ARGV[4]
if is_fenced(session_id) then return { 'fenced' } end
local answer, runs = { 'ok' }, {}
for i = 5, #ARGV, 3 do
  local job = load_job(ARGV[i])
  if job and job.state == 'leased' and job.epoch == ARGV[i + 1] and job.aid == ARGV[i + 2] then
    runs[job.id] = true
  else
    answer[#answer + 1] = ARGV[i + 2]
  end
end
local claimed = tonumber(call('HGET', P .. 'claimed:' .. session_id, 'seq') or 0)
if claimed > tonumber(ARGV[3]) then return answer end
local leases = P .. 'leases:' .. session_id
for _, id in ipairs(call('HKEYS', leases)) do
  local job = not runs[id] and load_job(id)
  if job and job.state == 'leased' and job.owner == session_id then
    job.epoch = int((math.floor(tonumber(job.epoch) / RUN_EPOCHS) + 1) * RUN_EPOCHS - 1)
    if give_up(job, false, 'the queue lost what its worker wrote', now) == 'requeued' then wake_one(place(job), now) end
  elseif not runs[id] then
    drop_lease(session_id, id, call('HGET', leases, id))
  end
end
-- New messages must stand behind the last one read, which may have been lost, on whatever clock.
local control = P .. 'ctl:' .. session_id
if call('EXISTS', control) == 1 and not call('XRANGE', control, last_read, '+', 'COUNT', 1)[1] then
  -- Refused if ids were given out beyond it: new messages stand behind it then. What is written above must be counted.
  redis.pcall('XADD', control, last_read, 'k', 'hello')
end
return answered(answer)
