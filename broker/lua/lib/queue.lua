-- Waiting streams: ``q:`` for new work (of one band and tenant), ``retry:`` and ``suspects:`` for work whose attempt ended.
-- An entry says beside its job of whose budgets that counts, and its cost (``of``), should its record be lost; and of a
-- new job with digests these (``digests``): then the longest wait of late is kept of the queue key.
-- uses: records, counters, fairness, suspicion, lifecycle
-- rarely: drop_entry

local lengths = {} -- of streams from which this call took entries

local function delete_entry(queue, entry_id)
  local removed = call('XDEL', P .. queue, entry_id)
  lengths[queue] = lengths[queue] and lengths[queue] - removed or call('XLEN', P .. queue)
  local empty = lengths[queue] == 0
  if empty then call('DEL', P .. queue) end
  return removed == 1, empty
end

-- Takes a queued job's entry out of its waiting stream. ``stands``: where its tenant stands, if it was charged.
local function leave_queue(job, stands)
  local _, empty = delete_entry(job.queue, job.entry)
  count_waiting(queue_key(job), -1, job.cost)
  if string.sub(job.queue, 1, 2) == 'q:' then move(queue_key(job) .. ':' .. job.band, job.tenant, stands, empty) end
end

-- Takes out an entry whose job is not to be found by it: the record was evicted or deleted.
local function drop_entry(queue, entry)
  if not delete_entry(queue, entry[1]) then return end
  local key = string.match(queue, '^q:(.*):%d:[^:]*$') or string.match(queue, '^%a+:(.*)$')
  local tenant, size, cost = string.match(entry[2][4] or '', '^(%S+) (%d+) (%d+)$')
  count_waiting(key, -1, cost or 0)
  if tenant then spend(string.match(key, '^[^:]*'), tenant, -1, -tonumber(size)) end
end

-- The queued job behind an entry; nil, after taking the entry out, if its job is not to be found by it.
local function job_of_entry(queue, entry)
  local job = load_job(entry[2][2])
  if job and job.state == 'queued' and job.entry == entry[1] then return job end
  drop_entry(queue, entry)
end

-- Puts a new job in line; its record has to be saved.
local function add_new_entry(job, digests)
  local of_band = queue_key(job) .. ':' .. job.band
  job.queue = 'q:' .. of_band .. ':' .. job.tenant
  activate(of_band, job.tenant)
  count_waiting(queue_key(job), 1, job.cost)
  local has_digests, wait = (digests or '') ~= '', queue_key(job) .. ':wait'
  if has_digests and counter('counters', wait) == 0 then add('counters', wait, 1) end
  lengths[job.queue] = nil
  job.entry = call('XADD', P .. job.queue, '*', 'id', job.id, 'of', job.tenant .. ' ' .. job.size .. ' ' .. job.cost,
    unpack(has_digests and { 'digests', digests } or {}))
end

-- Puts a job whose attempt ended in line again, ahead of new work; its record has to be saved.
local function add_retry_entry(job)
  job.queue = (is_suspect(job) and 'suspects:' or 'retry:') .. queue_key(job)
  count_waiting(queue_key(job), 1, job.cost)
  lengths[job.queue] = nil
  job.entry = call('XADD', P .. job.queue, '*', 'id', job.id, 'of', job.tenant .. ' ' .. job.size .. ' ' .. job.cost)
end

local function requeue(job, ...)
  add_retry_entry(job)
  transition(job, 'queued', ...)
end

local MAX_TENANTS = 256 -- of a band, looked at in one call

-- The waiting streams of a queue key, of each band those of the ``max_tenants`` that were served least; and whether these
-- are all of them.
local function streams_at(key, max_tenants)
  local queues, are_all = { 'retry:' .. key, 'suspects:' .. key }, true
  for band = 0, 3 do
    local tenants = call('ZRANGE', P .. 'active:' .. key .. ':' .. band, 0, max_tenants)
    are_all = are_all and #tenants <= max_tenants
    for i = 1, math.min(#tenants, max_tenants) do
      queues[#queues + 1] = 'q:' .. key .. ':' .. band .. ':' .. tenants[i]
    end
  end
  return queues, are_all
end
