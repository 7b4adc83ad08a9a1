-- Dead letters without their requests, oldest first.
-- ARGV: prefix, start (as XRANGE takes it), limit (letters).
-- Reply: {'more' or 'end', {entry id, fields and values}, ...}. 'more': the limit, or that of the bytes looked at for one
--       call, was reached; ask again behind the last letter.
-- Invariant: 8 bounded memory (requests are large, and stay here).

local LOOKED_AT_BYTES = 8 * 1024 * 1024
local start, left, bytes = ARGV[2], tonumber(ARGV[3]), 0
local answer = { 'more' }
while left > 0 and bytes < LOOKED_AT_BYTES do
  local entry = call('XRANGE', P .. 'dead', start, '+', 'COUNT', 1)[1]
  if not entry then
    answer[1] = 'end'
    break
  end
  local told = {}
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'env' then
      bytes = bytes + string.len(entry[2][i + 1])
    else
      told[#told + 1] = entry[2][i]
      told[#told + 1] = entry[2][i + 1]
    end
  end
  answer[#answer + 1] = { entry[1], told }
  start = '(' .. entry[1]
  left = left - 1
end
return answer
