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
  count_waiting(queue_key(job), job.queue, -1, job.cost)
  if string.sub(job.queue, 1, 2) == 'q:' then move(queue_key(job) .. ':' .. job.band, job.tenant, stands, empty) end
end

-- Takes out an entry whose job is not to be found by it: the record was evicted or deleted.
local function drop_entry(queue, entry)
  if not delete_entry(queue, entry[1]) then return end
  local key = string.match(queue, '^q:(.*):%d:[^:]*$') or string.match(queue, '^%a+:(.*)$')
  local tenant, size, cost = string.match(entry[2][4] or '', '^(%S+) (%d+) (%d+)$')
  count_waiting(key, queue, -1, cost or 0)
  if tenant then spend(string.match(key, '^[^:]*'), tenant, -1, -tonumber(size)) end
end

-- The queued job behind an entry; nil, after taking the entry out, if its job is not to be found by it.
local function job_of_entry(queue, entry)
  local job = load_job(entry[2][2])
  if job and job.state == 'queued' and job.entry == entry[1] then return job end
  drop_entry(queue, entry)
end

-- Puts a job at the end of its queue, with more fields beside; its record has to be saved.
local function add_entry(job, ...)
  count_waiting(queue_key(job), job.queue, 1, job.cost)
  lengths[job.queue] = nil
  job.entry = call('XADD', P .. job.queue, '*', 'id', job.id, 'of', job.tenant .. ' ' .. job.size .. ' ' .. job.cost, ...)
end

-- Puts a new job in line; its record has to be saved.
local function add_new_entry(job, digests)
  local of_band = queue_key(job) .. ':' .. job.band
  job.queue = 'q:' .. of_band .. ':' .. job.tenant
  activate(of_band, job.tenant)
  local has_digests, wait = (digests or '') ~= '', queue_key(job) .. ':wait'
  if has_digests and counter('counters', wait) == 0 then add('counters', wait, 1) end
  add_entry(job, unpack(has_digests and { 'digests', digests } or {}))
end

-- Puts a job whose attempt ended in line again, ahead of new work; its record has to be saved.
local function add_retry_entry(job)
  job.queue = (is_suspect(job) and 'suspects:' or 'retry:') .. queue_key(job)
  add_entry(job)
end

local function requeue(job, ...)
  add_retry_entry(job)
  transition(job, 'queued', ...)
end

-- The waiting streams of a queue key, of each band those of ``max_tenants`` at most: by what they were served the least
-- first, and behind ``from`` others. And whether these are the last.
local function streams_at(key, max_tenants, from)
  local queues, are_last, first = { 'retry:' .. key, 'suspects:' .. key }, true, from or 0
  for band = 0, 3 do
    local tenants = call('ZRANGE', P .. 'active:' .. key .. ':' .. band, first, first + max_tenants)
    are_last = are_last and #tenants <= max_tenants
    local of_band = 'q:' .. key .. ':' .. band .. ':'
    for i = 1, math.min(#tenants, max_tenants) do queues[#queues + 1] = of_band .. tenants[i] end
  end
  return queues, are_last
end
