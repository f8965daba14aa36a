{{- /* Rules over several values, which a schema cannot say. A chart gathers its problems, one a line, and refuses all of them at once. */}}

{{- /* Takes problems: lines of text. */}}
{{- define "common.refuse" -}}
{{- $lines := list -}}
{{- range splitList "\n" .problems }}{{ with trim . }}{{ $lines = append $lines (printf "  - %s" .) }}{{ end }}{{ end -}}
{{- if $lines }}{{ fail (printf "\n\n%d value(s) cannot work together:\n%s\n" (len $lines) (join "\n" $lines)) }}{{ end -}}
{{- end }}

{{- /* What is wrong with `global`, whatever the chart. Takes root. */}}
{{- define "common.problems" -}}
{{- $global := .root.Values.global -}}
{{- if and (eq $global.tls.mode "existingSecret") (not $global.tls.existingSecret) }}
global.tls.existingSecret is missing: mode existingSecret needs the name of a Secret with tls.crt, tls.key and ca.crt
{{- end }}
{{- if and (eq $global.tls.mode "certManager") (not (dig "name" "" $global.tls.issuerRef)) }}
global.tls.issuerRef.name is missing: mode certManager needs an issuer
{{- end }}
{{- if and (hasPrefix "file:" $global.store.url) (not $global.store.existingClaim) }}
global.store.existingClaim is missing: {{ $global.store.url }} is a folder that every pod must see
{{- end }}
{{- if and $global.store.existingClaim (not (hasPrefix "file:///store" $global.store.url)) }}
global.store.url is {{ $global.store.url | quote }}, but the claim {{ $global.store.existingClaim }} is mounted at /store: say file:///store
{{- end }}
{{- range $name := include "common.poolNames" . | fromJsonArray }}
{{- $at := printf "global.nodePools.%s" $name }}
{{- $pool := include "common.pool" (dict "root" $.root "pool" $name) | fromJson }}
{{- $given := get $global.nodePools $name }}
{{- $mode := $pool.gpu.mode }}
{{- if and (ne $mode "none") (not $pool.providerPool) (not $pool.match) }}
{{ $at }} selects no nodes: set providerPool or match
{{- end }}
{{- range $key, $modes := dict "profile" (list "mig") "deviceClass" (list "dra") "selectors" (list "dra") "resource" (list "device-plugin") "perNode" (list "device-plugin" "mig" "dra") "product" (list "device-plugin" "mig" "dra") }}
{{- if and (hasKey ($given.gpu | default dict) $key) (not (has $mode $modes)) }}
{{ $at }}.gpu.{{ $key }} says nothing in mode {{ $mode }}: it is for {{ join ", " $modes }}
{{- end }}
{{- end }}
{{- if and (eq $mode "mig") (not $pool.gpu.profile) }}
{{ $at }}.gpu.profile is missing: mode mig needs one, such as 3g.40gb
{{- end }}
{{- if and (eq $mode "dra") (not $pool.gpu.deviceClass) }}
{{ $at }}.gpu.deviceClass is missing: mode dra needs one
{{- end }}
{{- if and (ne $mode "none") (or (not $pool.nodes) (not $pool.gpu.perNode)) }}
{{ $at }} needs nodes and gpu.perNode: without them nobody can tell whether models fit
{{- end }}
{{- if and $pool.spot (not $pool.noticeSeconds) }}
{{ $at }}.noticeSeconds is missing: a spot node is taken away so many seconds after the notice
{{- end }}
{{- if and $pool.spot (eq $global.provider "generic") (not $pool.match) }}
{{ $at }}.match is missing: provider generic has no label for spot nodes
{{- end }}
{{- $total := mul $pool.nodes $pool.gpu.perNode }}
{{- if and (ne $mode "none") (gt (add $pool.spareGpus $pool.reservedGpus | int) (int $total)) }}
{{ $at }} has {{ int $pool.nodes }} × {{ int $pool.gpu.perNode }} = {{ $total }} GPUs; spareGpus {{ int $pool.spareGpus }} and reservedGpus {{ int $pool.reservedGpus }} are more
{{- end }}
{{- end }}
{{- end }}

{{- /* Problems of a list of pool names. Takes root, at (the key they stand in), pools, gpus. */}}
{{- define "common.poolProblems" -}}
{{- $root := .root -}}{{- $at := .at -}}{{- $gpus := int .gpus -}}
{{- $known := include "common.poolNames" . | fromJsonArray -}}
{{- $resources := list -}}{{- $several := gt (len .pools) 1 -}}
{{- range .pools }}
{{- if not (has . $known) }}
{{ $at }} is {{ . | quote }}, which global.nodePools does not have; it has {{ $known | join ", " | default "none" }}
{{- else }}
{{- $pool := include "common.pool" (dict "root" $root "pool" .) | fromJson }}
{{- $resource := ternary $pool.gpu.mode $pool.gpu.resource (has $pool.gpu.mode (list "dra" "none")) }}
{{- $resources = append $resources $resource | uniq }}
{{- if and (eq $pool.gpu.mode "none") (gt $gpus 0) }}
{{ $at }} is {{ . | quote }}, which has no GPUs, and {{ $gpus }} are asked for: set gpus 0
{{- else if and (ne $pool.gpu.mode "none") (eq $gpus 0) }}
{{ $at }} is {{ . | quote }}, whose nodes have GPUs, and none is asked for: set gpus
{{- else if and (ne $pool.gpu.mode "none") (gt $gpus (int $pool.gpu.perNode)) }}
{{ $at }} is {{ . | quote }}, whose nodes have {{ int $pool.gpu.perNode }} GPUs each, and one pod asks for {{ $gpus }}
{{- end }}
{{- if and $several (eq (include "common.poolExpressions" (dict "root" $root "pool" .)) "[]") }}
{{ $at }} has {{ . | quote }}, which selects no nodes of its own and so cannot be one of several
{{- end }}
{{- end }}
{{- end }}
{{- if gt (len $resources) 1 }}
{{ $at }} names pools whose GPUs are asked for differently ({{ join ", " $resources }}): a pod can only ask in one way
{{- end }}
{{- end }}

{{- /* top over base, map by map; null says nothing, while 0, false and "" do (merge and mergeOverwrite take those for unset). JSON. */}}
{{- define "common.overlay" -}}
{{- $both := deepCopy .base -}}
{{- range $key, $value := .top -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $both $key)) -}}
{{- $_ := set $both $key (include "common.overlay" (dict "base" (get $both $key) "top" $value) | fromJson) -}}
{{- else if not (kindIs "invalid" $value) -}}
{{- $_ := set $both $key $value -}}
{{- end -}}
{{- end -}}
{{- toJson $both -}}
{{- end }}

{{- /* A quantity of memory in MiB, rounded down; -1 for what is not one. */}}
{{- define "common.mebibytes" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9]+(\\.[0-9]+)?" $text | float64 -}}
{{- $suffix := regexReplaceAll "^[0-9.]+" $text "" -}}
{{- $bytes := get (dict "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0) $suffix -}}
{{- if $bytes }}{{ divf (mulf $number $bytes) 1048576.0 | floor | int64 }}{{ else }}-1{{ end -}}
{{- end }}
