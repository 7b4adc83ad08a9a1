-- A tenant's listed jobs, newest first, a page at a time. Places of jobs that are gone are cleared away.
-- ARGV: prefix, tenant, where to go on ('' at the newest, else the place last looked at: only older ones are given), limit
--       (jobs), states (comma separated, '' for all).
-- Reply: {'more' or 'end', the place last looked at, what is told of a job, ...}; 'more': the limit, or that of the places
--       looked at in one call, or of the bytes of one answer, was reached.
-- Invariants: 8 bounded memory, 9 isolation.

local LOOKED_AT = 512
local STEP = 64
local PAGE_BYTES = 1024 * 1024 -- past which an answer ends; one job_metadata may be as large as that

local tenant, place_before, limit = ARGV[2], ARGV[3], tonumber(ARGV[4])
local key = P .. 'listed:' .. tenant
local wanted = {}
for state in string.gmatch(ARGV[5], '[^,]+') do wanted[state] = true end

local answer = { 'more', place_before }
local looked, bytes = 0, 0
while #answer - 2 < limit and looked < LOOKED_AT and bytes < PAGE_BYTES do
  local from = answer[2] == '' and '+' or '(' .. answer[2]
  local places = call('ZREVRANGEBYLEX', key, from, '-', 'LIMIT', 0, STEP)
  for _, member in ipairs(places) do
    if #answer - 2 >= limit or bytes >= PAGE_BYTES then return answer end
    local id = string.sub(member, 17)
    local found = call('HMGET', P .. 'job:' .. id, 'tenant', 'listed', 'state')
    if found[1] ~= tenant or found[2] ~= '1' then
      call('ZREM', key, member)
    elseif ARGV[5] == '' or wanted[found[3]] then
      local job = stored().describe(id)
      answer[#answer + 1] = job
      bytes = bytes + string.len(job[#job]) -- its job_metadata
    end
    answer[2] = member
    looked = looked + 1
  end
  if #places < STEP then
    answer[1] = 'end'
    return answer
  end
end
return answer
