-- Hands each job to a parked worker that offers a slot, where nothing waits; or puts it on its queue and wakes a parked
-- worker, of the job's region if it has one. An interactive job that finds neither has an attempt of a lower lane yield.
-- ARGV: prefix, limits on live jobs and bytes of a tenant, of a pool (4), and on a tenant's persisted bytes, base of the
--       ids of attempts that are handed over ('' hands nothing over: in a repeated call), then per job:
--       id, envelope, pool, lane, band, tenant, reply (of a persisted job: its first listener), persisted, ttl_ms,
--       max_attempts, region, remote_after_ms, resume (1: when an attempt is lost, its Router says where it goes on; y<n>: it
--       may yield n times), cost, weight (of its tenant),
--       patience (ms that it may have to wait, by prediction; 0: it must not wait at all; '' for any), and
--       for persisted jobs, else empty: retention_ms, digest of the idempotency key ('' for none), digest of the request,
--       listed (1: it is kept however it ends, and stands in its tenant's list), topic (of the notice that is put on the shard's
--       stream of ends), job metadata (opaque); and of every job the digests of its prefix ('' for none).
-- Reply: per job 'queued' (also of one that was handed over), or the state of a job of that id that is already known
--       (tombstones included: a job cancelled before it came is void), or 'over <budget>' or
--       'late <predicted wait in ms, if known>' where nothing was written. A job that waits: 'queued <predicted wait>' if it
--       is known. Where another job holds the idempotency key: 'other <job id> <state>', or 'mismatch' if its request is another one.
-- Invariants: 1 no lost job, 2 one result, 3 fence, 4 idempotency, 8 bounded memory, 12 conservation, 13 liveness.
-- uses: affinity, counters, handoff, parking, persisted, prediction, preemption, queue
-- rarely: persist, holder, listen, add_new_entry, wake, is_parked_at, unpark, ask_to_yield, note_start

local now = now_ms()
local came_at = int(now)
local BUDGETS = { 'tenant_jobs', 'tenant_bytes', 'pool_jobs', 'pool_bytes', 'tenant_persisted' }
local LIMITS = { tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]) }
local attempt_base, handed_over = ARGV[7], 0

-- The first of the budgets ``fields`` that a job would exceed; nil if there is room.
local function over_budget(fields, size, persisted_bytes)
  local more = { 1, size, 1, size, persisted_bytes }
  for i, field in ipairs(fields) do
    if counter('budget', field) + more[i] > LIMITS[i] then return BUDGETS[i] end
  end
end

-- The job that holds an idempotency key, as the reply says it; nil if there is none any more.
local function holder(idem, request)
  local id, theirs = string.match(call('GET', P .. 'idem:' .. idem) or '', '^(%S+) (%S+)$')
  local held_by = id and load_job(id)
  return held_by and (theirs == request and 'other ' .. id .. ' ' .. held_by.state or 'mismatch')
end

-- What a persisted job has beside its record.
local function persist(job, router, retention_ms, idem, request, listed, topic, metadata)
  local kept_for = int(tonumber(job.deadline) - now + tonumber(retention_ms) + EXPIRY_SLACK_MS)
  call('DEL', P .. 'out:' .. job.id, P .. 'listeners:' .. job.id)
  call('HSET', P .. 'job:' .. job.id, 'retention_ms', retention_ms, 'idem', idem, 'job_metadata', metadata,
    'listed', listed, 'topic', topic)
  count_bytes(job, PERSISTED_BYTES + string.len(metadata))
  if listed == '1' then
    local key = P .. 'listed:' .. job.tenant
    call('ZADD', key, 0, list_member(job.id, now))
    if call('PTTL', key) < tonumber(kept_for) then call('PEXPIRE', key, kept_for) end
  end
  if idem ~= '' then call('SET', P .. 'idem:' .. idem, job.id .. ' ' .. request, 'PX', kept_for) end
  if router ~= '' then listen(job.id, router, job.deadline) end
end

local function enqueue(budgets, id, envelope, pool, lane, band, tenant, reply, persisted, ttl_ms, max, region, remote_after_ms, resume,
    cost, weight, patience, retention_ms, idem, request, listed, topic, metadata, digests)
  local key, size, is_persisted = P .. 'job:' .. id, string.len(envelope), persisted == '1'
  local earlier = load_job(id)
  if earlier then
    if is_persisted and reply ~= '' and not TERMINAL[earlier.state] then listen(id, reply, earlier.deadline) end
    return earlier.state
  end
  local refusal = idem ~= '' and holder(idem, request)
  if refusal then return refusal end
  local over = over_budget(budgets, size, is_persisted and PERSISTED_BYTES + string.len(metadata))
  if over then return 'over ' .. over end

  local deadline, shared = int(now + tonumber(ttl_ms)), pool .. ':' .. lane
  local for_region = region ~= '' and tonumber(remote_after_ms) > 0
  local job = { id = id, state = 'queued', epoch = '1', aid = '', attempts = '0', max = max, owner = '', pool = pool,
    lane = for_region and lane .. '@' .. region or lane, band = band, tenant = tenant, reply = is_persisted and '' or reply,
    persisted = persisted, deadline = deadline, size = int(size), at = came_at, queue = '', entry = '', resume = resume,
    cost = cost, weight = weight, charged = '', predicted = '', suspicion = '' }
  local at, aid, owner, entry = queue_key(job), attempt_base .. handed_over, nil, nil
  local outcome, cost_of_band = shared .. ':affinity/', at .. ':' .. band .. ':cost'
  if not known.counters[cost_of_band] then
    read('counters', { at .. ':waiting', cost_of_band, shared .. ':enqueued', shared .. ':leased', outcome .. 'none',
      unpack(counts_for_yields(pool)) })
  end
  if digests ~= '' then read('counters', { at .. ':wait', outcome .. 'warm', outcome .. 'cold' }) end
  if attempt_base ~= '' then owner, entry = hand_over(at, id, envelope, aid, ttl_ms, digests) end
  if not owner then
    local is_free = waiting(at) == 0 and (least_loaded(at) or is_parked_at(at, now))
    if not is_free then job.predicted = predicted_wait(job) or '' end
    if patience ~= '' and not is_free and (patience == '0' or (tonumber(job.predicted) or 0) > tonumber(patience)) then
      return 'late ' .. job.predicted
    end
  end
  if owner then
    job.state, job.lane, job.aid, job.attempts, job.owner, job.entry = 'leased', lane, aid, '1', owner.id, entry
    handed_over = handed_over + 1
    gather('HSET', P .. 'leases:' .. owner.id, id, '1')
    add('counters', shared .. ':leased', 1)
    note_start(job, now, owner.region)
    remember(job, digests, owner.cache)
  else
    local best = digests ~= '' and waiting(at) == 0 and least_loaded(at)
    local preferred = best and warmest(at, digests, best)
    add_new_entry(job, digests)
    if own_jobs[job.queue] then own_jobs[job.queue] = own_jobs[job.queue] + 1 end
    if not wake(at, now, preferred and preferred.id) then ask_to_yield(at, now) end
  end
  save(job, 'env', envelope, unpack(digests ~= '' and { 'digests', digests } or {}))
  if for_region and not owner then call('HSET', key, 'eligible_at', int(now + tonumber(remote_after_ms))) end
  if is_persisted then persist(job, reply, retention_ms, idem, request, listed, topic, metadata) end
  if is_persisted and owner then call('HSET', key, 'started', came_at) end
  gather('ZADD', P .. 'deadlines', deadline, id)
  spend(pool, tenant, 1, size)
  add('counters', shared .. ':enqueued', 1)
  return job.predicted ~= '' and 'queued ' .. job.predicted or 'queued'
end

local answers, budgets, all = {}, {}, {} -- by job, in the order of BUDGETS; those of many tenants are read by one command
for i = 8, #ARGV, 23 do
  local t, p, is_persisted = 't:' .. ARGV[i + 5], 'p:' .. ARGV[i + 2], ARGV[i + 7] == '1'
  budgets[i] = { t .. ':jobs', t .. ':bytes', p .. ':jobs', p .. ':bytes', is_persisted and t .. ':persisted' or nil }
  for _, field in ipairs(budgets[i]) do all[field] = true end
end
read('budget', names_of(all))
for i = 8, #ARGV, 23 do answers[#answers + 1] = enqueue(budgets[i], unpack(ARGV, i, i + 22)) end
write_offers()
return write_counters_and_return(answers)
