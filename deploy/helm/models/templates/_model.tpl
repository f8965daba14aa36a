{{- /* Models by name; what is null is not one. A JSON list. */}}
{{- define "models.names" -}}
{{- $names := list -}}
{{- range $name, $model := .Values.models }}{{ if not (kindIs "invalid" $model) }}{{ $names = append $names $name }}{{ end }}{{ end -}}
{{- toJson $names -}}
{{- end }}

{{- /* All of a model's values, with what `defaults` and its pool say for it. Takes root, model. JSON, worked out once a rendering. */}}
{{- define "models.entry" -}}
{{- if not (hasKey .root.Values "worked") }}{{ $_ := set .root.Values "worked" dict }}{{ end -}}
{{- if not (hasKey .root.Values.worked .model) }}{{ $_ := set .root.Values.worked .model (include "models.workedEntry" .) }}{{ end -}}
{{- get .root.Values.worked .model -}}
{{- end }}

{{- define "models.workedEntry" -}}
{{- $own := get .root.Values.models .model | default dict -}}
{{- $entry := include "common.overlay" (dict "base" .root.Values.defaults "top" $own) | fromJson -}}
{{- /* A replica count that is null gives the field to somebody else; one that is not there is the default. */}}
{{- $_ := set $entry "countGiven" (hasKey $own "replicas") -}}
{{- if and $entry.countGiven (kindIs "invalid" $own.replicas) }}{{ $_ := set $entry "replicas" nil }}{{ end -}}
{{- $pools := $own.pools | default (ternary (list $own.pool) (list) (ne ($own.pool | default "") "")) | default $entry.pools | default (list $entry.pool) -}}
{{- $_ := set $entry "twoWays" (and (not (empty $own.pool)) (not (empty $own.pools))) -}}
{{- $_ := set $entry "pools" $pools -}}
{{- $first := include "common.pool" (dict "root" .root "pool" (first $pools)) | fromJson -}}
{{- if not (hasKey $entry "gpus") }}{{ $_ := set $entry "gpus" (ternary 0 1 (eq $first.gpu.mode "none")) }}{{ end -}}
{{- $_ := set $entry "cpuOnly" (eq $first.gpu.mode "none") -}}
{{- $surge := ternary 1 0 (ge (int $first.spareGpus) (mul $entry.gpus $entry.nodesPerReplica | int)) -}}
{{- $_ := set $entry "spare" (eq $surge 1) -}}
{{- $_ := set $entry "surge" (ternary ($entry.rollout.surge | int) $surge (hasKey $entry.rollout "surge")) -}}
{{- $_ := set $entry "scaled" (not (empty $entry.autoscaling)) -}}
{{- if $entry.scaled -}}
{{- $_ := set $entry "autoscaling" (include "common.overlay" (dict "base" (dict "min" 1 "max" 1 "signal" "queue" "target" 8 "engine" "hpa") "top" $entry.autoscaling) | fromJson) -}}
{{- $_ := set $entry "most" ($entry.autoscaling.max | int) -}}
{{- else -}}
{{- $_ := set $entry "most" (ternary 0 ($entry.replicas | int) (kindIs "invalid" $entry.replicas)) -}}
{{- end -}}
{{- $_ := set $entry "grace" (include "common.graceSeconds" (dict "sleep" $entry.drain.sleepSeconds "longest" $entry.drain.maxGenerationSeconds) | int) -}}
{{- $_ := set $entry "cacheClass" (ternary $first.cacheClass "" (eq $entry.weights.source "hf")) -}}
{{- $_ := set $entry "fetched" (or (eq $entry.weights.source "hf") (and (eq $entry.weights.source "pvc") (ne $entry.weights.ref ""))) -}}
{{- toJson $entry -}}
{{- end }}

{{- define "models.keda" -}}
{{- if .Capabilities.APIVersions.Has "keda.sh/v1alpha1" }}yes{{ end -}}
{{- end }}

{{- define "models.gatewayAddress" -}}
{{ .Values.scaling.gatewayAddress | default (ternary "" (printf "%s.%s.svc:8444" (include "common.name" (dict "root" . "component" "gateway")) .Release.Namespace) .Chart.IsRoot) }}
{{- end }}

{{- define "models.serviceAccount" -}}
{{ include "common.name" (dict "root" . "component" "model") }}
{{- end }}

{{- /* The claim with a model's weights. Takes it, weights. */}}
{{- define "models.claim" -}}
{{ .weights.claim | default (printf "%s-weights" (include "common.name" .it)) }}
{{- end }}

{{- /* Whether any model runs on several nodes. */}}
{{- define "models.groups" -}}
{{- range $model := include "models.names" . | fromJsonArray }}{{ if gt (int (include "models.entry" (dict "root" $ "model" $model) | fromJson).nodesPerReplica) 1 }}yes{{ end }}{{ end -}}
{{- end }}

{{- /* Whether any model's pods fetch their own weights. */}}
{{- define "models.fetchingPods" -}}
{{- range $model := include "models.names" . | fromJsonArray }}{{ if (include "models.entry" (dict "root" $ "model" $model) | fromJson).cacheClass }}yes{{ end }}{{ end -}}
{{- end }}
