{{- /* A namespace in which a worker's Jobs run: the trainer's account, the worker's rights, and what a training pod may reach. The platform
chart renders it for its own job namespaces, the tenant chart for a tenant's.
Takes root; namespace; worker and workerNamespace (its account's name and place, also its pods' namespace); policies (networkPolicy values); labels
(YAML), if others than the trainer's; accountAnnotations.
What stands between a training pod and the rest stays when the release goes, as the pods do. */}}
{{- define "common.jobNamespace" -}}
{{- $labels := .labels | default (include "common.labels" (dict "root" .root "component" "trainer")) -}}
{{- $apis := .root.Capabilities.APIVersions -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: argosy-trainer
  namespace: {{ .namespace }}
  labels: {{- $labels | nindent 4 }}
  annotations:
    helm.sh/resource-policy: keep
    {{- with .accountAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
automountServiceAccountToken: false
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ .worker }}
  namespace: {{ .namespace }}
  labels: {{- $labels | nindent 4 }}
rules:
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
{{- if $apis.Has "jobset.x-k8s.io/v1alpha2" }}
- apiGroups: [jobset.x-k8s.io]
  resources: [jobsets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
{{- end }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ .worker }}
  namespace: {{ .namespace }}
  labels: {{- $labels | nindent 4 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: {{ .worker }}}
subjects:
- {kind: ServiceAccount, name: {{ .worker }}, namespace: {{ .workerNamespace }}}
{{- if .policies.enabled }}
---
# Everything in this namespace, trainer or not: nothing comes in, nothing goes out.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: argosy-deny
  namespace: {{ .namespace }}
  labels: {{- $labels | nindent 4 }}
  annotations: {helm.sh/resource-policy: keep}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: argosy-trainer
  namespace: {{ .namespace }}
  labels: {{- $labels | nindent 4 }}
  annotations: {helm.sh/resource-policy: keep}
spec:
  podSelector: {matchLabels: {app.kubernetes.io/component: trainer}}
  policyTypes: [Egress]
  egress:
  - to:
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: {{ .workerNamespace }}}}
      podSelector: {matchLabels: {app.kubernetes.io/part-of: argosy, app.kubernetes.io/component: finetune}}
    ports: [{protocol: TCP, port: 8601}]
  {{- include "common.egressRules" (dict "root" .root "policies" .policies "to" (list "dns" "store")) | nindent 2 }}
{{- if $apis.Has "jobset.x-k8s.io/v1alpha2" }}
  # Ranks of one attempt find each other.
  - to: [{podSelector: {matchLabels: {app.kubernetes.io/component: trainer}}}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: argosy-ranks
  namespace: {{ .namespace }}
  labels: {{- $labels | nindent 4 }}
  annotations: {helm.sh/resource-policy: keep}
spec:
  podSelector: {matchLabels: {app.kubernetes.io/component: trainer}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app.kubernetes.io/component: trainer}}}]}]
{{- end }}
{{- end }}
{{- end }}

{{- /* Egress rules by name: dns, store, database, apiServer. Takes root, policies, to. A store of files needs no edge. */}}
{{- define "common.egressRules" -}}
{{- $policies := .policies -}}
{{- range .to }}
{{- if eq . "dns" }}
- to:
  - namespaceSelector: {{- toYaml $policies.dns.namespaceSelector | nindent 6 }}
  ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]
{{- else if or (ne . "store") (not (hasPrefix "file:" $.root.Values.global.store.url)) }}
{{- $edge := get $policies . }}
- ports:
  - {protocol: TCP, port: {{ int $edge.port }}}
  {{- if and (eq . "apiServer") (ne (int $edge.port) 443) }}
  - {protocol: TCP, port: 443}
  {{- end }}
  {{- with $edge.cidrs }}
  to:
  {{- range . }}
  - ipBlock: {cidr: {{ . }}}
  {{- end }}
  {{- end }}
{{- end }}
{{- end }}
{{- end }}
