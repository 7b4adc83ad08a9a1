-- Takes what attempts put out, and ends those whose answer is complete. Frames of persisted jobs are kept and sent to their
-- listeners, those of others sent to the Router that waits.
-- ARGV: prefix, then per attempt: job id, epoch, attempt id, outcome ('' while it goes on, done, failed or expired),
--       used (what it has cost, '' if unknown), run_ms (how long it had its slot, '' if unknown), restarts_output (1: its first frame drops the output of earlier attempts), seq of the first frame, number of
--       frames, the packed frames (of jobs that are not persisted: any number in one).
-- Reply: per attempt 'ok' (frames that are there already change nothing), 'duplicate' (this attempt itself ended the job),
--       'fenced' or 'gone'. Frames go out only with 'ok', those for one Router in one entry. An attempt with a gap before
--       its first frame (the server lost its latest writes) loses its persisted job, and is fenced.
-- Invariants: 2 one result, 3 fence, 4 idempotency, 7 streams, 8 bounded memory, 12 conservation.
-- uses: attempts, fence, rates
-- rarely: note_correction, write_corrections, retry_or_end, keep, expected, now_ms, save

-- The seq of the next frame of this attempt.
local function expected(job)
  local epoch, seq = string.match(call('HGET', P .. 'job:' .. job.id, 'next') or '', '^(%d+)-(%d+)$')
  return epoch == job.epoch and tonumber(seq) or 0
end

-- Keeps the frames of ARGV[from..] whose seq, counted from ``seq``, is ``due`` or later. Answers them.
local function keep(job, restarts_output, seq, due, from, number)
  local key, out = P .. 'job:' .. job.id, P .. 'out:' .. job.id
  if restarts_output and due == 0 and number > 0 then
    call('HSET', key, 'output_epoch', job.epoch)
    if call('DEL', out) > 0 then
      local found = call('HMGET', key, 'persisted_bytes', 'job_metadata')
      count_bytes(job, PERSISTED_BYTES + string.len(found[2] or '') - tonumber(found[1]))
      call('HSET', key, 'output_replaced', '1')
    end
  end
  local frames, bytes = {}, 0
  for i = math.max(due - seq, 0), number - 1 do
    local frame = ARGV[from + i]
    call('XADD', out, job.epoch .. '-' .. int(seq + i), 'f', frame)
    frames[#frames + 1] = frame
    bytes = bytes + string.len(frame)
  end
  if #frames > 0 then
    count_bytes(job, bytes)
    call('HSET', key, 'next', job.epoch .. '-' .. int(seq + number))
    local left_ms = math.max(tonumber(job.deadline) - now_ms(), 0)
    call('PEXPIRE', out, int(left_ms + tonumber(call('HGET', key, 'retention_ms')) + EXPIRY_SLACK_MS))
  end
  return frames
end

local answers, i = {}, 2
while i <= #ARGV do
  local outcome, seq, number = ARGV[i + 3], tonumber(ARGV[i + 7]), tonumber(ARGV[i + 8])
  local job, refusal = fence(ARGV[i], ARGV[i + 1], ARGV[i + 2])
  local due = job and job.persisted == '1' and expected(job)
  if due and seq > due then
    retry_or_end(job, false, 'a part of its output was lost', now_ms())
    refusal = 'fenced'
  elseif job then
    local frames = due and keep(job, ARGV[i + 6] == '1', seq, due, i + 9, number)
      or { unpack(ARGV, i + 9, i + 8 + number) }
    if #frames > 0 then post(job, table.concat(frames)) end
    if outcome ~= '' then
      leave_lease(job)
      if ARGV[i + 4] ~= '' then note_correction(job, tonumber(ARGV[i + 4])) end
      if outcome == 'done' then observe(job, tonumber(ARGV[i + 5])) end
      if outcome == 'expired' then job.why = EXPIRED_RUNNING end
      end_job(job, outcome, job.aid, outcome == 'expired' and 'running' or nil)
    end
  end
  answers[#answers + 1] = refusal or 'ok'
  i = i + 9 + number
end
if next(corrections) then write_corrections() end
send_posted()
return write_counters_and_return(answers)
