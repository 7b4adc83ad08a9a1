-- Removes dead letters.
-- ARGV: prefix, then entry ids.
-- Reply: how many of them were there.
-- Invariant: 8 bounded memory (their bytes are given back once).

local removed = 0
for i = 2, #ARGV do
  local entry = call('XRANGE', P .. 'dead', ARGV[i], ARGV[i])[1]
  if entry then
    removed = removed + 1
    call('XDEL', P .. 'dead', ARGV[i])
    for field = 1, #entry[2], 2 do
      if entry[2][field] == 'size' then add('budget', 'dead:bytes', -tonumber(entry[2][field + 1])) end
    end
  end
end
return answered(removed)
