-- Ends any job, by its worker or by someone else.
-- uses: finish, persisted, queue, leases, notify
-- rarely: keep_or_drop_output

local EXPIRED_WAITING = 'its time ran out in the queue'
local EXPIRED_RUNNING = 'its time ran out while it ran'

local function end_job(job, state, aid, cause)
  local fields = job.persisted == '1'
    and call('HMGET', P .. 'job:' .. job.id, 'persisted_bytes', 'idem', 'retention_ms', 'topic', 'listed')
  job.listed = fields and fields[5]
  write_tombstone(job, state, aid, cause)
  if fields then keep_or_drop_output(job, unpack(fields)) end
end

-- Cancels or expires a job that has not ended, by someone else than its worker.
local function cancel_or_expire(job, state, reason, cause)
  local was = job.state
  if was == 'leased' then
    leave_lease(job)
    call('XADD', P .. 'ctl:' .. job.owner, 'NOMKSTREAM', '*', 'k', 'abort', 'job', job.id, 'why', reason)
  elseif was == 'lost' then
    call('ZREM', P .. 'lost', job.id)
  else
    leave_queue(job)
  end
  job.why = reason
  end_job(job, state, '', cause or was == 'leased' and 'running' or 'waiting')
  notify(job, state, job.epoch, reason)
end
