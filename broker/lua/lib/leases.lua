-- Leases: ``leases:<session>`` holds the epoch of each job that a worker session runs.
-- uses: records, counters, suspicion, preemption
-- rarely: offer_next_suspect

local function leave_lease(job)
  gather('HDEL', P .. 'leases:' .. job.owner, job.id)
  add('counters', queue_key(job) .. ':leased', -1)
  note_end(job)
  if is_suspect(job) then offer_next_suspect(job) end
end
