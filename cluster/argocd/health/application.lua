-- An Application is as healthy as what it made: waves of the app of apps wait for it.
if obj.status ~= nil and obj.status.health ~= nil and obj.status.health.status ~= nil then
  return { status = obj.status.health.status, message = obj.status.health.message or "" }
end
return { status = "Progressing", message = "" }
