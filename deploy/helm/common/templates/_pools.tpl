{{- /* From a node pool to a pod's scheduling. Nothing else in these charts writes affinity for GPUs, their tolerations or their requests. */}}

{{- /* What each provider calls things on its nodes. */}}
{{- define "common.providers" -}}
generic:
  pool: argosy.dev/pool
  product: nvidia.com/gpu.product
gke:
  pool: cloud.google.com/gke-nodepool
  product: cloud.google.com/gke-accelerator
  spot: {key: cloud.google.com/gke-spot, value: "true"}
  spotTaint: {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
eks:
  pool: eks.amazonaws.com/nodegroup
  product: nvidia.com/gpu.product
  spot: {key: eks.amazonaws.com/capacityType, value: SPOT}
karpenter:
  pool: karpenter.sh/nodepool
  product: karpenter.k8s.aws/instance-gpu-name
  spot: {key: karpenter.sh/capacity-type, value: spot}
aks:
  pool: kubernetes.azure.com/agentpool
  product: nvidia.com/gpu.product
  spot: {key: kubernetes.azure.com/scalesetpriority, value: spot}
  spotTaint: {key: kubernetes.azure.com/scalesetpriority, operator: Equal, value: spot, effect: NoSchedule}
{{- end }}

{{- define "common.provider" -}}
{{ get (include "common.providers" . | fromYaml) .root.Values.global.provider | toJson }}
{{- end }}

{{- /* Pools by name; what is null is none. Takes root. A JSON list. */}}
{{- define "common.poolNames" -}}
{{- $names := list -}}
{{- range $name, $pool := .root.Values.global.nodePools }}{{ if not (kindIs "invalid" $pool) }}{{ $names = append $names $name }}{{ end }}{{ end -}}
{{- toJson $names -}}
{{- end }}

{{- /* A pool with all that it leaves out. Takes root, pool (its name). JSON. */}}
{{- define "common.pool" -}}
{{- $given := get .root.Values.global.nodePools .pool | default dict -}}
{{- $gpu := dict "mode" "device-plugin" "resource" "nvidia.com/gpu" "product" list "perNode" 0 -}}
{{- $silent := dict "providerPool" "" "match" dict "taints" list "gpu" $gpu "nodes" 0 "spareGpus" 0 "reservedGpus" 0 "spot" false "zoneSpread" false "runtimeClassName" "" "cacheClass" "" -}}
{{- $pool := include "common.overlay" (dict "base" $silent "top" $given) | fromJson -}}
{{- if eq $pool.gpu.mode "mig" }}{{ $_ := set $pool.gpu "resource" (printf "nvidia.com/mig-%s" ($pool.gpu.profile | default "")) }}{{ end -}}
{{- toJson $pool -}}
{{- end }}

{{- /* Node selector requirements of one pool. Takes root, pool. A JSON list. */}}
{{- define "common.poolExpressions" -}}
{{- $provider := include "common.provider" . | fromJson -}}
{{- $pool := include "common.pool" . | fromJson -}}
{{- $expressions := list -}}
{{- with $pool.providerPool }}{{ $expressions = append $expressions (dict "key" $provider.pool "operator" "In" "values" (list .)) }}{{ end -}}
{{- range $label, $values := $pool.match }}{{ $expressions = append $expressions (dict "key" $label "operator" "In" "values" $values) }}{{ end -}}
{{- with $pool.gpu.product }}{{ $expressions = append $expressions (dict "key" $provider.product "operator" "In" "values" .) }}{{ end -}}
{{- if and $pool.spot $provider.spot }}{{ $expressions = append $expressions (dict "key" $provider.spot.key "operator" "In" "values" (list $provider.spot.value)) }}{{ end -}}
{{- toJson $expressions -}}
{{- end }}

{{- /* A pod's tolerations for one pool: its taints exactly, since Kubernetes adds none by itself. Takes root, pool. A JSON list. */}}
{{- define "common.poolTolerations" -}}
{{- $provider := include "common.provider" . | fromJson -}}
{{- $pool := include "common.pool" . | fromJson -}}
{{- $tolerations := list -}}
{{- range $pool.taints -}}
{{- $tolerations = append $tolerations (merge (dict "operator" (ternary "Equal" "Exists" (hasKey . "value"))) .) -}}
{{- end -}}
{{- if and $pool.spot $provider.spotTaint }}{{ $tolerations = append $tolerations $provider.spotTaint }}{{ end -}}
{{- toJson $tolerations -}}
{{- end }}

{{- /* Pod fields. Takes root; pools (names: the first is preferred, the rest are fallbacks); claim (name of a ResourceClaimTemplate, for
DRA); spread (selector labels: spread these over zones and nodes, where a pool asks for it); revision (the label that tells one rollout's
pods from another's). */}}
{{- define "common.scheduling" -}}
{{- $root := .root -}}
{{- $terms := list -}}{{- $preferred := list -}}{{- $tolerations := list -}}{{- $spread := false -}}{{- $runtime := "" -}}{{- $dra := false -}}
{{- $last := sub (len .pools) 1 | int -}}
{{- range $order, $name := .pools -}}
{{- $pool := include "common.pool" (dict "root" $root "pool" $name) | fromJson -}}
{{- $expressions := include "common.poolExpressions" (dict "root" $root "pool" $name) | fromJsonArray -}}
{{- if $expressions -}}
{{- $terms = append $terms (dict "matchExpressions" $expressions) -}}
{{- if lt $order $last }}{{ $preferred = append $preferred (dict "weight" (max 1 (sub 100 (mul 20 $order))) "preference" (dict "matchExpressions" $expressions)) }}{{ end -}}
{{- end -}}
{{- $tolerations = concat $tolerations (include "common.poolTolerations" (dict "root" $root "pool" $name) | fromJsonArray) | uniq -}}
{{- $spread = or $spread $pool.zoneSpread -}}
{{- $runtime = $runtime | default $pool.runtimeClassName -}}
{{- $dra = or $dra (eq $pool.gpu.mode "dra") -}}
{{- end -}}
{{- $lines := dict -}}
{{- if $terms -}}
{{- $affinity := dict "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" $terms) -}}
{{- with $preferred }}{{ $_ := set $affinity "preferredDuringSchedulingIgnoredDuringExecution" . }}{{ end -}}
{{- $_ := set $lines "affinity" (dict "nodeAffinity" $affinity) -}}
{{- end -}}
{{- with $tolerations }}{{ $_ := set $lines "tolerations" . }}{{ end -}}
{{- with $runtime }}{{ $_ := set $lines "runtimeClassName" . }}{{ end -}}
{{- if and $dra .claim }}{{ $_ := set $lines "resourceClaims" (list (dict "name" "gpus" "resourceClaimTemplateName" .claim)) }}{{ end -}}
{{- if and $spread .spread -}}
{{- $constraints := list -}}
{{- range $key, $when := dict "topology.kubernetes.io/zone" "DoNotSchedule" "kubernetes.io/hostname" "ScheduleAnyway" -}}
{{- $constraint := dict "maxSkew" 1 "topologyKey" $key "whenUnsatisfiable" $when "nodeTaintsPolicy" "Honor" "labelSelector" (dict "matchLabels" $.spread) -}}
{{- with $.revision }}{{ $_ := set $constraint "matchLabelKeys" (list .) }}{{ end -}}
{{- $constraints = append $constraints $constraint -}}
{{- end -}}
{{- $_ := set $lines "topologySpreadConstraints" $constraints -}}
{{- end -}}
{{- if $lines }}{{ toYaml $lines }}{{ end -}}
{{- end }}

{{- /* A container's resources with its GPUs in them. Takes root, pools, gpus, resources (requests and limits of the rest). */}}
{{- define "common.resources" -}}
{{- $pool := include "common.pool" (dict "root" .root "pool" (first .pools)) | fromJson -}}
{{- $resources := deepCopy (.resources | default dict) -}}
{{- if and (gt (int .gpus) 0) (eq $pool.gpu.mode "dra") -}}
{{- $_ := set $resources "claims" (list (dict "name" "gpus")) -}}
{{- else if and (gt (int .gpus) 0) (ne $pool.gpu.mode "none") -}}
{{- $_ := set $resources "limits" (merge (dict $pool.gpu.resource (int .gpus)) ($resources.limits | default dict)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{- /* What a pod on DRA pools claims, as one device request; empty on any other pool. Takes root, pools, gpus. JSON. */}}
{{- define "common.claimRequest" -}}
{{- $root := .root -}}{{- $gpus := int .gpus -}}
{{- $devices := list -}}
{{- range .pools -}}
{{- $gpu := (include "common.pool" (dict "root" $root "pool" .) | fromJson).gpu -}}
{{- if and (eq $gpu.mode "dra") (gt $gpus 0) -}}
{{- $device := dict "name" . "deviceClassName" $gpu.deviceClass "count" $gpus -}}
{{- with $gpu.selectors -}}
{{- $selectors := list -}}
{{- range . }}{{ $selectors = append $selectors (dict "cel" (dict "expression" .)) }}{{ end -}}
{{- $_ := set $device "selectors" $selectors -}}
{{- end -}}
{{- $devices = append $devices $device -}}
{{- end -}}
{{- end -}}
{{- if gt (len $devices) 1 -}}
{{- dict "name" "gpus" "firstAvailable" $devices | toJson -}}
{{- else if $devices -}}
{{- dict "name" "gpus" "exactly" (omit (first $devices) "name") | toJson -}}
{{- end -}}
{{- end }}

{{- /* A claim template can never be changed, so what it asks for is part of its name. Takes prefix, root, pools, gpus. */}}
{{- define "common.claimName" -}}
{{ .prefix }}-{{ include "common.claimRequest" . | sha256sum | trunc 8 }}
{{- end }}

{{- /* The ResourceClaimTemplate of pods on DRA pools; empty on any other. Takes root, pools, gpus, name, namespace, labels (YAML). */}}
{{- define "common.claimTemplate" -}}
{{- with include "common.claimRequest" . -}}
apiVersion: resource.k8s.io/v1
kind: ResourceClaimTemplate
metadata:
  name: {{ $.name }}
  namespace: {{ $.namespace }}
  labels: {{- $.labels | nindent 4 }}
spec:
  spec:
    devices:
      requests: {{- list (fromJson .) | toYaml | nindent 6 }}
{{- end -}}
{{- end }}
