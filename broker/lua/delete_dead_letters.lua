-- Removes dead letters.
-- ARGV: prefix, then entry ids.
-- Reply: how many of them were there.
-- Invariant: 8 bounded memory (their bytes are given back once).
-- uses: dead_letters

local removed = 0
for i = 2, #ARGV do
  local entry = call('XRANGE', P .. 'dead', ARGV[i], ARGV[i])[1]
  if entry then remove_letter(entry) end
  removed = removed + (entry and 1 or 0)
end
return write_counters_and_return(removed)
