# Workers with internal addresses only: they reach Google's services through Private Google Access and nothing else,
# as there is no NAT. Models therefore come from the bucket or the image, never from a hub.

resource "google_compute_network" "this" {
  project                 = var.project
  name                    = var.name
  auto_create_subnetworks = false
  depends_on              = [google_project_service.this]
}

resource "google_compute_subnetwork" "this" {
  #checkov:skip=CKV_GCP_76:the subnetwork is IPv4 only, so there is no IPv6 access to make private
  project                  = var.project
  name                     = var.name
  region                   = var.region
  network                  = google_compute_network.this.id
  ip_cidr_range            = var.subnetwork_cidr
  private_ip_google_access = true
  stack_type               = "IPV4_ONLY"

  log_config {
    aggregation_interval = "INTERVAL_10_MIN"
    flow_sampling        = 0.1
    metadata             = "INCLUDE_ALL_METADATA"
  }
}

# Dataflow tags its workers "dataflow". 12345 is used by streaming and 12346 by batch jobs that shuffle on the workers.
resource "google_compute_firewall" "workers" {
  project     = var.project
  name        = "${var.name}-workers"
  description = "Dataflow workers to each other"
  network     = google_compute_network.this.id
  direction   = "INGRESS"
  source_tags = ["dataflow"]
  target_tags = ["dataflow"]

  allow {
    protocol = "tcp"
    ports    = ["12345-12346"]
  }
}
