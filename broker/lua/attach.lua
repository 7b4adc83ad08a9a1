-- Reads what is kept of a persisted job, a page at a time, and makes a Router one of its listeners: what the job says from
-- this call on is sent there as well.
-- ARGV: prefix, job id, router ('' to read only), id of the first entry wanted ('-' or epoch-seq). A reader that goes on
--       asks from the last entry that it has: if that is not there any more, the server lost its latest writes.
-- Reply: {} if the job is unknown, else {state, epoch, attempt id, id of the entry that will be written next ('' if none
--       ever was), 1 if the page reaches the end of the output, why it ended ('' unless it was kept without an answer),
--       packed frame, ...}.
-- Invariants: 4 idempotency, 7 streams.
-- uses: listeners, records, transitions

local PAGE_FRAMES, MIN_FRAMES, STEP = 512, 2, 16 -- the reader may know one
local PAGE_BYTES = 1024 * 1024 -- past which a page ends; one frame may be larger

local id, router, first = ARGV[2], ARGV[3], ARGV[4]
local job = load_job(id)
if not job then return {} end
if router ~= '' and job.persisted == '1' and not TERMINAL[job.state] then listen(id, router, job.deadline) end

local found = job.persisted == '1' and call('HMGET', P .. 'job:' .. id, 'next', 'cause') or {}
local answer = { job.state, tonumber(job.epoch), job.aid, found[1] or '', 0, found[2] or '' }
local bytes, number = 0, 0
while number < PAGE_FRAMES do
  local entries = call('XRANGE', P .. 'out:' .. id, first, '+', 'COUNT', STEP)
  for _, entry in ipairs(entries) do
    if bytes >= PAGE_BYTES and number >= MIN_FRAMES then return answer end
    answer[#answer + 1] = entry[2][2]
    bytes, number = bytes + string.len(entry[2][2]), number + 1
    first = '(' .. entry[1]
  end
  if #entries < STEP then
    answer[5] = 1
    return answer
  end
end
return answer
