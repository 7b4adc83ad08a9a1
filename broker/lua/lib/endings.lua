-- The end of any job, by its worker's word or another's.
-- uses: finish, persisted, queue, leases, notify

local function end_job(job, state, aid, cause)
  local kept = job.persisted == '1'
    and call('HMGET', P .. 'job:' .. job.id, 'persisted_bytes', 'idem', 'retention_ms', 'topic')
  finish(job, state, aid, cause)
  if kept then close(job, unpack(kept)) end
end

-- Cancels or expires a job that has not ended, by the word of another than its worker.
local function stop(job, state, reason, cause)
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
