# Run with mocked providers: terraform test. Nothing is created; names, arguments and outputs are what is checked.

mock_provider "google" {
  mock_resource "google_service_account" {
    defaults = {
      name  = "projects/test-project/serviceAccounts/worker@test-project.iam.gserviceaccount.com"
      email = "worker@test-project.iam.gserviceaccount.com"
    }
  }
}

mock_provider "google-beta" {}

override_resource {
  target = google_service_account.launcher
  values = {
    name  = "projects/test-project/serviceAccounts/launcher@test-project.iam.gserviceaccount.com"
    email = "launcher@test-project.iam.gserviceaccount.com"
  }
}

variables {
  project   = "test-project"
  image_tag = "abc1234"
}

run "safe_by_default" {
  command = apply

  assert {
    condition = alltrue([for bucket in [google_storage_bucket.dataset, google_storage_bucket.staging] :
      bucket.uniform_bucket_level_access && bucket.public_access_prevention == "enforced" && !coalesce(bucket.force_destroy, false)
    ])
    error_message = "A bucket can be read by the public, or deleted while it holds images."
  }

  assert {
    condition     = google_compute_subnetwork.this.private_ip_google_access
    error_message = "Workers without external addresses need Private Google Access."
  }

  assert {
    condition = (
      google_compute_firewall.workers.direction == "INGRESS" &&
      one(google_compute_firewall.workers.allow).protocol == "tcp" &&
      one(one(google_compute_firewall.workers.allow).ports) == "12345-12346" &&
      length(try(coalesce(google_compute_firewall.workers.source_ranges), [])) == 0 &&
      one(google_compute_firewall.workers.source_tags) == "dataflow" &&
      one(google_compute_firewall.workers.target_tags) == "dataflow"
    )
    error_message = "The firewall must open Dataflow's ports between workers and nothing else."
  }

  assert {
    condition = alltrue([for binding in concat(values(google_storage_bucket_iam_binding.dataset), values(google_storage_bucket_iam_binding.staging)) :
      alltrue([for member in binding.members : startswith(member, "serviceAccount:") || member == "projectOwner:test-project"])
    ])
    error_message = "Only the two service accounts, and owners as administrators, may reach the buckets by default."
  }

  assert {
    condition     = toset(keys(google_project_iam_member.this)) == toset(["roles/dataflow.worker", "roles/dataflow.developer"])
    error_message = "A project-wide role was added: give it on the bucket, repository or account instead."
  }

  assert {
    condition     = contains(keys(google_project_service.this), "cloudresourcemanager.googleapis.com")
    error_message = "The project's roles are given by the Resource Manager API."
  }

  assert {
    condition = (
      length(google_dataflow_flex_template_job.this) == 0 && length(google_cloud_scheduler_job.this) == 0 &&
      length(google_monitoring_alert_policy.this) == 0 && length(google_billing_budget.this) == 0
    )
    error_message = "Jobs, schedules, alerts and budgets are made only when asked for."
  }
}

run "worker_replaces_no_weights_and_no_template" {
  command = apply

  assert {
    condition = toset([for binding in google_storage_bucket_iam_binding.worker : one(binding.condition).expression]) == toset([
      "!resource.name.startsWith(\"projects/_/buckets/test-project-sdjax-dataset/objects/models/\")",
      "!resource.name.startsWith(\"projects/_/buckets/test-project-sdjax-staging/objects/templates/\")",
    ])
    error_message = "The worker must write neither models/ nor templates/."
  }

  assert {
    condition = alltrue([for binding in concat(values(google_storage_bucket_iam_binding.dataset), values(google_storage_bucket_iam_binding.staging)) :
      !(binding.role == "roles/storage.objectUser" && contains(binding.members, "serviceAccount:worker@test-project.iam.gserviceaccount.com"))
    ])
    error_message = "The worker must write by its conditional binding alone."
  }
}

run "template_names_image_and_safe_environment" {
  command = apply

  assert {
    condition     = toset(keys(google_storage_bucket_object.template)) == toset(["tpu", "cuda"])
    error_message = "There must be a template for each target."
  }

  assert {
    condition = alltrue([for target, object in google_storage_bucket_object.template :
      jsondecode(object.content).image == output.sdk_container_image[target] &&
      jsondecode(object.content).sdkInfo.language == "PYTHON" &&
      jsondecode(object.content).defaultEnvironment.sdkContainerImage == output.sdk_container_image[target] &&
      jsondecode(object.content).defaultEnvironment.ipConfiguration == "WORKER_IP_PRIVATE" &&
      contains(jsondecode(object.content).defaultEnvironment.additionalExperiments, "no_use_multiple_sdk_containers")
    ])
    error_message = "A template must name its own image, private addresses and one process a worker."
  }

  assert {
    condition = alltrue([for name in ["prompts", "output", "sdk_location", "worker_zone"] :
      contains(jsondecode(google_storage_bucket_object.template["tpu"].content).metadata.parameters[*].name, name)
    ])
    error_message = "The template's metadata must declare each parameter that a job passes."
  }

  assert {
    condition     = output.sdk_container_image.tpu == "us-central1-docker.pkg.dev/test-project/sdjax/sdjax-tpu:abc1234"
    error_message = "The image must be named by target and tag."
  }

  assert {
    condition     = output.template_file_gcs_location.cuda == "gs://test-project-sdjax-staging/templates/abc1234/cuda.json"
    error_message = "The template must lie in the staging bucket, under the image's tag."
  }
}

run "key_is_used_everywhere" {
  command = apply

  variables {
    cmek = {
      key            = "projects/test-project/locations/us-central1/keyRings/r/cryptoKeys/k"
      project_number = 123456789
    }
  }

  assert {
    condition = alltrue([for encryption in [google_storage_bucket.dataset.encryption, google_storage_bucket.staging.encryption] :
      encryption[0].default_kms_key_name == var.cmek.key
    ])
    error_message = "Both buckets must be encrypted with the key."
  }

  assert {
    condition     = google_artifact_registry_repository.images.kms_key_name == var.cmek.key && output.dataflow_kms_key == var.cmek.key
    error_message = "Images and jobs must be encrypted with the key."
  }

  assert {
    condition = alltrue([for object in google_storage_bucket_object.template :
      jsondecode(object.content).defaultEnvironment.kmsKeyName == var.cmek.key
    ])
    error_message = "The template must pass the key on."
  }

  assert {
    condition     = length(google_kms_crypto_key_iam_member.service_agent) == 4
    error_message = "Storage, Compute, Dataflow and Artifact Registry each need the key."
  }
}

run "alerts_and_budget" {
  command = apply

  variables {
    alerts = { emails = ["ops@example.com"], stall_minutes = 45, max_hours = 10 }
    budget = { billing_account = "012345-6789AB-CDEF01", amount = 500 }
  }

  assert {
    condition     = toset(keys(google_monitoring_alert_policy.this)) == toset(["failed", "stalled", "long"])
    error_message = "Failure, stall and length must each raise an alert."
  }

  assert {
    condition = (
      google_monitoring_alert_policy.this["stalled"].conditions[0].condition_threshold[0].duration == "2700s" &&
      google_monitoring_alert_policy.this["long"].conditions[0].condition_threshold[0].threshold_value == 36000
    )
    error_message = "The alerts must use the given times."
  }

  assert {
    condition = (
      strcontains(google_monitoring_alert_policy.this["failed"].documentation[0].content, "capacity, quota, zone or image") &&
      google_monitoring_alert_policy.this["stalled"].conditions[0].condition_threshold[0].evaluation_missing_data != "EVALUATION_MISSING_DATA_ACTIVE"
    )
    error_message = "A job without workers fails, and one that has ended is not stalled."
  }

  assert {
    condition     = google_billing_budget.this[0].amount[0].specified_amount[0].units == "500"
    error_message = "The budget must be the given amount."
  }
}

run "public_reader_is_refused" {
  command         = plan
  expect_failures = [var.readers]

  variables {
    readers = ["allUsers"]
  }
}

run "public_launcher_is_refused" {
  command         = plan
  expect_failures = [var.launchers]

  variables {
    launchers = ["allAuthenticatedUsers"]
  }
}

run "public_writer_is_refused" {
  command         = plan
  expect_failures = [var.writers]

  variables {
    writers = ["domain:example.com"]
  }
}

run "readers_read_and_writers_write" {
  command = apply

  variables {
    readers = ["group:readers@example.com"]
    writers = ["user:writer@example.com"]
  }

  assert {
    condition = alltrue([for member in ["group:readers@example.com", "user:writer@example.com"] :
      contains(google_storage_bucket_iam_binding.dataset["roles/storage.legacyObjectReader"].members, member) &&
      !contains(google_storage_bucket_iam_binding.staging["roles/storage.legacyObjectReader"].members, member)
    ])
    error_message = "Readers and writers must be able to read the dataset, and not staging."
  }

  assert {
    condition = (
      contains(google_storage_bucket_iam_binding.dataset["roles/storage.objectUser"].members, "user:writer@example.com") &&
      !contains(google_storage_bucket_iam_binding.dataset["roles/storage.objectUser"].members, "group:readers@example.com")
    )
    error_message = "Writers must be able to write the dataset, and readers not."
  }
}

run "moving_tag_is_refused" {
  command         = plan
  expect_failures = [var.image_tag]

  variables {
    image_tag = "latest"
  }
}

run "zone_for_region_is_refused" {
  command         = plan
  expect_failures = [var.region]

  variables {
    region = "us-central1-a"
  }
}

run "unknown_target_is_refused" {
  command         = plan
  expect_failures = [var.targets]

  variables {
    targets = ["rocm"]
  }
}

run "alerts_without_address_are_refused" {
  command         = plan
  expect_failures = [var.alerts]

  variables {
    alerts = { emails = [] }
  }
}
