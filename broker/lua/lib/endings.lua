-- How jobs end, and leases with them.
-- uses: records, lifecycle, counters, queue, suspicion, notify, persisted, dead_letters

local function total(job, event)
  add('counters', job.pool .. ':' .. without_region(job.lane) .. ':' .. event, 1)
end

local function leave_lease(job)
  remove('HDEL', P .. 'leases:' .. job.owner, job.id)
  add('counters', queue_key(job) .. ':leased', -1)
  if is_suspect(job) then offer_next_suspect(job) end
end

-- Takes a lease away whose job is not held by it: its record was evicted or deleted. ``value``: as it stands there.
local function drop_lease(owner, id, value)
  if call('HDEL', P .. 'leases:' .. owner, id) == 0 then return end
  local key, tenant, size = string.match(value or '', '^%S+ (%S+) (%S+) (%d+)$')
  if not key then return end
  add('counters', key .. ':leased', -1)
  spend(string.match(key, '^[^:]*'), tenant, -1, -tonumber(size))
end

-- Ends a job that is not leased any more and returns its budget. ``aid``: the attempt that ended it by its own word, or ''.
-- ``cause`` is counted beside the state of what was cancelled or expired: 'waiting', 'running' or 'router_gone'.
local function finish(job, state, aid, cause)
  local kept = job.persisted == '1'
    and call('HMGET', P .. 'job:' .. job.id, 'persisted_bytes', 'idem', 'keep_ms', 'notify')
  transition(job, state, 'epoch', job.epoch, 'aid', aid)
  if kept then close(job, unpack(kept)) end
  remove('ZREM', P .. 'deadlines', job.id)
  spend(job.pool, job.tenant, -1, -tonumber(job.size))
  total(job, state)
  if cause then total(job, state .. '/' .. cause) end
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
  finish(job, state, '', cause or was == 'leased' and 'running' or 'waiting')
  notify(job, state, job.epoch, reason)
end

-- A leased job whose attempts are used up becomes a dead letter.
local function declare_dead(job, reason, now)
  leave_lease(job)
  add_letter(job, reason, call('HGET', P .. 'job:' .. job.id, 'env'), now)
  job.why = reason
  finish(job, 'dead', job.aid)
  notify(job, 'dead', job.epoch, reason)
end
